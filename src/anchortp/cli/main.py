"""`anchortp`: serve, anchor, status, device, fault, demo, plan, topology, bench."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anchortp.cli.bench import app as bench_app
from anchortp.cli.device import app as device_app
from anchortp.errors import AnchorTPError

app = typer.Typer(
    help="Tensor-parallel LLM serving that keeps answering when a device dies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        help="Private folder where anchors, server and tools meet. Default: ANCHORTP_RUNTIME_DIR, else one per user."
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory budget of each device, as 4G or 512M. Default: an equal share of 80 % of what is free; "
        "GPUs need the option."
    ),
]


class FaultKind(StrEnum):
    lost = "lost"
    crash = "crash"
    hang = "hang"


class KVMirror(StrEnum):
    host = "host"
    off = "off"


class KernelsBy(StrEnum):
    auto = "auto"
    native = "native"
    torch = "torch"
    triton = "triton"


class AttentionBy(StrEnum):
    auto = "auto"
    torch = "torch"
    sdpa = "sdpa"
    flashinfer = "flashinfer"


class WeightsLayout(StrEnum):
    auto = "auto"
    plain = "plain"


class ExpertCut(StrEnum):
    experts = "experts"
    columns = "columns"


class PlanPolicy(StrEnum):
    makespan = "makespan"
    units = "units"
    cmm = "cmm"
    greedy = "greedy"


class Collectives(StrEnum):
    auto = "auto"
    shm = "shm"
    gloo = "gloo"
    peer = "peer"
    nccl = "nccl"
    mixed = "mixed"


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder or hub name; 'smollm2' for the packaged one, 'smollm2-moe' for a mixture of "
            "experts made of it."
        ),
    ],
    tp: Annotated[int | None, typer.Option(help="Devices to use: cpu:0 to cpu:N-1. Default: 1.", min=1)] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="Instead of --tp: devices by name, as cpu:0,cpu:2 or cuda:0,cuda:1 (cuda:0/0: a part)."),
    ] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    weights: Annotated[
        WeightsLayout,
        typer.Option(
            help="auto: bfloat16 in the panels that this CPU's matmul reads, where they are known. plain: never."
        ),
    ] = WeightsLayout.auto,
    expert_cut: Annotated[
        ExpertCut, typer.Option(help="Of a mixture of experts each device holds whole experts, or columns of all.")
    ] = ExpertCut.experts,
    device_memory: DeviceMemory = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together. Default: the model's, at most 8192.")
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the KV cache holds. Default: --max-num-seqs at full length; fewer where memory is short."
        ),
    ] = None,
    kv_mirror: Annotated[
        KVMirror, typer.Option(help="host: sealed KV blocks are copied to host memory.")
    ] = KVMirror.host,
    kv_mirror_memory: Annotated[
        str | None,
        typer.Option(help="Memory of the mirror, as 2G. Default: the whole cache, up to a tenth of what is free."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at the same time.")] = 16,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one step, at least --max-num-seqs.")] = 512,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get a 429.")] = 256,
    speed: Annotated[
        list[str] | None, typer.Option(help="Relative speed of a device, as cpu:0=2.0; repeat. Widths follow.")
    ] = None,
    spares: Annotated[int, typer.Option(help="Warm processes that wait to replace a worker.", min=0)] = 1,
    collectives: Annotated[
        Collectives, typer.Option(help="auto: shm on the host; on GPUs nccl or mixed, or peer where devices share one.")
    ] = Collectives.auto,
    plan_policy: Annotated[
        PlanPolicy, typer.Option(help="Who plans recoveries; cmm is the paper's. See `anchortp plan`.")
    ] = PlanPolicy.makespan,
    eplb: Annotated[bool, typer.Option(help="Of a mixture of experts: replicate hot ones where memory allows.")] = True,
    eplb_interval: Annotated[float, typer.Option(help="Seconds between two looks at the experts' load.")] = 10.0,
    attention: Annotated[AttentionBy, typer.Option(help="On GPUs: auto and sdpa are torch's fused one.")] = (
        AttentionBy.auto
    ),
    kernels: Annotated[
        KernelsBy,
        typer.Option(
            help="native: ours, on CPUs, compiled once by this machine's C++ compiler. triton: ours, on GPUs. auto: "
            "native where there is a compiler, else torch's."
        ),
    ] = KernelsBy.auto,
    cuda_graphs: Annotated[bool, typer.Option(help="On GPUs: capture decode steps and replay them.")] = True,
    eplb_replica_cost: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="What a replica costs a step beside its tokens, in choices of experts (docs/eplb.md). Default: 32 on "
            "CPUs, 300 on GPUs.",
        ),
    ] = None,
    pipelined_load: Annotated[
        bool, typer.Option(help="Compute the first layers while the last are still loaded.")
    ] = True,
    packed_weights: Annotated[
        bool,
        typer.Option(
            "--packed-weights",
            help="Keep weights in the cache folder as devices hold them: loads read them several times as fast, for up "
            "to the model's size on disk.",
        ),
    ] = False,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in the API. Default: the hub name as given, else the folder's name.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ANCHORTP_API_KEY", help="Ask clients for this key.")] = None,
    keep_anchors: Annotated[
        bool, typer.Option("--keep-anchors", help="Leave weights in the anchors when stopping.")
    ] = False,
    grace: Annotated[float, typer.Option(help="Seconds that running streams get to finish on SIGTERM.")] = 30.0,
    fault_script: Annotated[
        Path | None, typer.Option(help="JSON list of strikes (docs/lifecycle.md): faults at named places.")
    ] = None,
    log_file: Annotated[Path | None, typer.Option(help="Log here instead of to the terminal.")] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Serve MODEL with the OpenAI API; start missing anchors, attach to running ones."""
    from anchortp.cli import serving
    from anchortp.config import cache_folder

    serving.serve(
        serving.ServeOptions(
            model=model,
            devices=serving.parse_devices(tp, devices),
            host=host,
            port=port,
            served_model_name=served_model_name,
            api_key=api_key,
            keep_anchors=keep_anchors,
            grace_s=grace,
            fault_script=fault_script,
            log_file=log_file,
            runtime_dir=runtime_dir,
        ),
        dtype=dtype,
        weights=weights.value,
        expert_cut=expert_cut.value,
        device_memory_bytes=serving.parse_bytes(device_memory),
        max_model_len=max_model_len,
        kv_tokens=kv_tokens,
        kv_mirror=kv_mirror.value,
        kv_mirror_bytes=serving.parse_bytes(kv_mirror_memory),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_num_batched_tokens,
        max_waiting=max_waiting,
        num_spares=spares,
        collectives=collectives.value,
        plan_policy=plan_policy.value,
        eplb=eplb,
        eplb_interval_s=eplb_interval,
        attention=attention.value,
        kernels=kernels.value,
        cuda_graphs=cuda_graphs,
        eplb_replica_choices=eplb_replica_cost,
        pipelined_load=pipelined_load,
        packed_folder=str(cache_folder() / "packed") if packed_weights else "",
        speeds=serving.parse_speeds(speed or []),
    )


@app.command()
def anchor(
    device: Annotated[str, typer.Argument(help="The device whose memory this anchor owns, as cpu:0.")],
    device_memory: Annotated[str, typer.Option(help="Memory budget, as 4G or 512M.")],
    runtime_dir: RuntimeDir = None,
) -> None:
    """Run the anchor of DEVICE in the foreground, until SIGTERM. It outlives every server."""
    from anchortp.cli.serving import parse_bytes
    from anchortp.config import default_runtime_dir
    from anchortp.state.anchor import run_anchor

    budget = parse_bytes(device_memory)
    assert budget is not None
    run_anchor(device=device, budget_bytes=budget, runtime_dir=runtime_dir or default_runtime_dir())


@app.command()
def status(
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="ANCHORTP_API_KEY")] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show devices, workers, requests and the last recoveries."""
    from anchortp.cli import status as view

    view.show(runtime_dir, json_output=json_output, api_key=api_key)


@app.command()
def fault(
    device: Annotated[str, typer.Argument(help="Where to strike, as cpu:2.")],
    kind: Annotated[
        FaultKind,
        typer.Option(
            help="lost: memory overwritten and gone, with its worker. crash: its worker is killed. "
            "hang: its worker is stopped."
        ),
    ],
    runtime_dir: RuntimeDir = None,
) -> None:
    """Inject a fault into a running system."""
    from anchortp.config import default_runtime_dir
    from anchortp.errors import WireError
    from anchortp.state.client import AnchorClient

    try:
        with AnchorClient.connect(runtime_dir or default_runtime_dir(), device, role="tool") as client:
            client.inject(kind.value)
    except WireError as error:
        raise AnchorTPError(f"{device} has no anchor that answers ({error}). `anchortp status` lists them.") from None
    typer.echo(f"{device}: {kind.value}")


@app.command()
def demo(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; by default the packaged SmolLM2.")] = None,
    moe: Annotated[bool, typer.Option("--moe", help="SmolLM2 made into a mixture of 8 experts, some hotter.")] = False,
    tp: Annotated[int, typer.Option(min=2)] = 4,
    lose: Annotated[str, typer.Option(help="The device that dies.")] = "cpu:2",
    streams: Annotated[int, typer.Option(min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 160,
    device_memory: Annotated[str, typer.Option(help="Memory budget of each device, as 4G or 512M.")] = "2G",
) -> None:
    """The whole story in one command: serve, speak, lose a device, go on."""
    from anchortp.cli import demo as story
    from anchortp.cli.serving import parse_bytes
    from anchortp.errors import ConfigError

    if moe and model is not None:
        raise ConfigError(f"--moe brings a model of its own; leave out {model!r} or --moe.")
    raise typer.Exit(
        story.run(
            model=model or ("smollm2-moe" if moe else "smollm2"),
            tp=tp,
            lose=lose,
            num_streams=streams,
            max_tokens=max_tokens,
            device_memory_bytes=parse_bytes(device_memory),
        )
    )


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Built-in name, model folder or config.json; no weights are needed.")],
    num_before: Annotated[
        int | None, typer.Option("--from", min=1, help="Devices of the old group. Default: all of the topology.")
    ] = None,
    num_after: Annotated[
        int | None, typer.Option("--to", min=1, help="Devices of the new group. Default: those that are left.")
    ] = None,
    onto: Annotated[str, typer.Option(help="Instead of --to: the devices of the new group, as gpu:4,gpu:5.")] = "",
    lost: Annotated[str, typer.Option(help="Devices whose memory is gone, by rank or name, as 3,5.")] = "",
    already_lost: Annotated[
        str, typer.Option(help="Devices that were lost before, one after the other: begin with what that left.")
    ] = "",
    topology: Annotated[
        str, typer.Option(help="YAML file, preset (mi210-2x4, dgx-h100, pcie-4, 2-nodes-8, local) or cluster-NxM.")
    ] = "mi210-2x4",
    policy: Annotated[
        str, typer.Option(help="The plan to detail: makespan, units, cmm, greedy or reload.")
    ] = "makespan",
    speed: Annotated[list[str] | None, typer.Option(help="Relative speed of a device, as 0=2.0; repeat.")] = None,
    memory: Annotated[
        list[str] | None, typer.Option(help="GB that a device can hold, as 48 for all or 3=32; repeat.")
    ] = None,
    kv_tokens: Annotated[int, typer.Option(min=0, help="Tokens in the KV cache, which moves as well.")] = 0,
    kv_mirror: Annotated[str, typer.Option(help="Places that hold a mirror of the KV cache, as host.")] = "",
    weights_at: Annotated[str, typer.Option(help="Places to load weights from, instead of the topology's.")] = "",
    explain: Annotated[
        str | None,
        typer.Option(
            help="Say where one unit comes from: attention:5, kv:2, mlp:0, vocab:0, expert:12.3 (layer.expert), "
            "plane:2 (the KV cache of a KV head), replicated."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw transfers per link over time into this PNG.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Show what a change of devices moves and how long it takes, under every planner."""
    from anchortp.cli import plan as planner

    options = planner.PlanOptions(
        model=model,
        num_before=num_before,
        num_after=num_after,
        onto=onto,
        lost=lost,
        already_lost=already_lost,
        topology=topology,
        policy=policy,
        speeds=tuple(speed or ()),
        memory=tuple(memory or ()),
        kv_tokens=kv_tokens,
        kv_mirror=kv_mirror,
        weights_at=weights_at,
    )
    planner.run(options, json_output=json_output, plot=plot, explain_unit=explain)


app.add_typer(bench_app, name="bench")
app.add_typer(device_app, name="device")

topology_app = typer.Typer(help="Devices and links: show a topology, or measure this machine.", no_args_is_help=True)
app.add_typer(topology_app, name="topology")


@topology_app.command("show")
def topology_show(
    name: Annotated[str, typer.Argument(help="Preset, cluster-NxM, or YAML file.")],
    yaml_output: Annotated[bool, typer.Option("--yaml", help="As a file that --topology reads.")] = False,
) -> None:
    """Show places and links."""
    from anchortp.cli import topology as topologies

    topologies.show(name, yaml_output=yaml_output)


@topology_app.command("measure")
def topology_measure(
    output: Annotated[Path | None, typer.Option(help="Write the YAML here instead of to stdout.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Virtual devices of the topology.")] = 4,
    size: Annotated[str, typer.Option(help="Bytes to copy and to read at a time.")] = "256M",
    folder: Annotated[Path | None, typer.Option(help="Where to put the file that is read.")] = None,
) -> None:
    """Measure this machine's memory and disk, and write them as the topology `local`."""
    from anchortp.cli import topology as topologies
    from anchortp.cli.serving import parse_bytes

    size_bytes = parse_bytes(size)
    assert size_bytes is not None
    topologies.measure(output, num_devices=devices, size_bytes=size_bytes, folder=folder)


def main() -> None:
    """Entry point: errors of ours are one line on stderr and exit status 2 (1 for all others)."""
    try:
        app()
    except AnchorTPError as error:
        print(f"anchortp: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
