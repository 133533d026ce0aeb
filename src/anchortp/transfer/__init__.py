"""How bytes move: a checkpoint as a source of units, and the loader that fills arenas from it.

Nothing is imported here, so that `anchortp.transfer.fingerprint` stays free of torch.
"""
