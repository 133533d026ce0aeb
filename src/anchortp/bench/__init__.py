"""What a sceptic reruns: loads over plain OpenAI HTTP, faults, baselines, statistics, reports.

Nothing here looks into an engine: systems are started by a command and measured from outside, all by one client.
"""
