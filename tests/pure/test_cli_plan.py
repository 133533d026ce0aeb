"""`anchortp plan` and `anchortp topology` as a user types them: what they print, and how they refuse."""

from __future__ import annotations

import json
import struct

import pytest

from anchortp.cli import topology as topologies
from anchortp.cli.main import main
from anchortp.layout import initial_layout
from anchortp.plan import POLICIES, SHAPES
from anchortp.plan.topology import PRESETS, cluster, parse_topology, preset

QWEN = "Qwen/Qwen3-30B-A3B"
BOX = """
places:
  host: {kind: host}
  a: {kind: device, memory_gb: 40}
  b: {kind: device, memory_gb: 40}
  c: {kind: device, memory_gb: 40}
links:
  - {between: [host, a], gb_per_s: 25}
  - {between: [host, b], gb_per_s: 25}
  - {between: [host, c], gb_per_s: 5}
weights_at: [host]
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["anchortp", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        output = capsys.readouterr()
        return int(done.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def document(run):
    def document(*arguments: str) -> dict:
        status, out, err = run("plan", *arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return document


# ------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_byte_of_the_new_layout_is_kept_copied_or_loaded(document, policy):
    found = document(QWEN, "--from", "8", "--to", "7", "--lost", "3", "--policy", policy)
    shape = SHAPES["Qwen3-30B-A3B"]
    devices = found["devices"]
    assert list(devices) == [f"gpu:{i}" for i in (0, 1, 2, 4, 5, 6, 7)]
    for device in devices.values():
        assert device["kept_bytes"] >= 0
        assert device["kept_bytes"] + device["copied_bytes"] + device["loaded_bytes"] == device["weight_bytes"]
    for family in ("attention", "vocab", "expert"):
        assert sum(device["widths"][family] for device in devices.values()) == shape.num_units[family]
    row = next(row for row in found["policies"] if row["policy"] == policy)
    for kind in ("kept", "copied", "loaded"):
        assert sum(device[f"{kind}_bytes"] for device in devices.values()) == row[f"{kind}_bytes"]
    assert max(device["ready_s"] for device in devices.values()) == pytest.approx(found["predicted_s"])


def test_links_and_critical_path_explain_the_predicted_time(document):
    found = document(QWEN, "--from", "8", "--lost", "3", "--policy", "cmm")
    for link in found["links"]:
        assert link["busy_s"] == pytest.approx(link["bytes"] / link["bytes_per_s"])
        assert 0 < link["share"] <= 1 + 1e-9
    assert sum(step["seconds"] for step in found["critical"]) == pytest.approx(found["predicted_s"], rel=1e-3)


def test_the_default_is_the_fastest_and_none_beats_the_bound(document):
    found = document(QWEN, "--from", "8", "--lost", "3,5")
    assert [row["policy"] for row in found["policies"]] == list(POLICIES)
    assert found["policy"] == "makespan"
    assert found["predicted_s"] <= min(row["predicted_s"] for row in found["policies"])
    bound = found["lower_bound"]
    assert all(row["predicted_s"] >= bound["seconds"] * (1 - 1e-9) for row in found["policies"])
    assert all(row["loaded_bytes"] >= bound["lost_bytes"] for row in found["policies"])


@pytest.mark.parametrize(
    ("arguments", "to", "lost", "leaving", "joining"),
    [
        (("--from", "8", "--lost", "3"), (0, 1, 2, 4, 5, 6, 7), (3,), (), ()),
        (("--from", "8", "--lost", "gpu:3,5"), (0, 1, 2, 4, 6, 7), (3, 5), (), ()),
        (("--from", "8", "--to", "6", "--lost", "3"), (0, 1, 2, 4, 5, 6), (3,), (7,), ()),
        (("--from", "4", "--to", "3"), (0, 1, 2), (), (3,), ()),
        (("--from", "7", "--to", "8"), (0, 1, 2, 3, 4, 5, 6, 7), (), (), (7,)),
        (("--from", "4", "--to", "4", "--lost", "1"), (0, 2, 3, 4), (1,), (), (4,)),
    ],
)
def test_which_devices_stay_leave_and_join(document, arguments, to, lost, leaving, joining):
    asked = document(QWEN, *arguments)["problem"]
    names = {
        key: tuple(int(d.removeprefix("gpu:")) for d in asked[key]) for key in ("to", "lost", "leaving", "joining")
    }
    assert names == {"to": to, "lost": lost, "leaving": leaving, "joining": joining}


def test_devices_of_other_nodes_take_over(document):
    """The old ones are read until the end; neither group has a device of the other."""
    found = document(QWEN, "--from", "4", "--onto", "gpu:4,gpu:5,6,7", "--topology", "2-nodes-8")
    asked = found["problem"]
    assert asked["leaving"] == [f"gpu:{i}" for i in range(4)] and asked["to"] == [f"gpu:{i}" for i in range(4, 8)]
    assert sum(device["kept_bytes"] for device in found["devices"].values()) == 0


def test_who_is_sooner_because_it_brings_no_kv_cache_is_seen_to(document, run):
    arguments = (QWEN, "--from", "4", "--onto", "4,5,6,7", "--topology", "2-nodes-8", "--kv-tokens", "10000")
    rows = {row["policy"]: row for row in document(*arguments)["policies"]}
    assert rows["reload"]["predicted_s"] < rows["makespan"]["predicted_s"]
    assert rows["reload"]["replayed_kv_heads"] == [0, 1, 2, 3] and rows["makespan"]["replayed_kv_heads"] == []
    assert "replayed" in run("plan", *arguments)[1] and "replayed" not in run("plan", QWEN, "--lost", "3")[1]


@pytest.mark.parametrize("model", [QWEN, "Qwen3-8B"])
def test_a_fault_after_others_begins_with_what_those_left(document, model):
    """A fault after two: the survivors keep all they hold, and receive no more than what the third lost."""
    third = document(model, "--from", "8", "--already-lost", "6,1", "--lost", "3")
    assert third["problem"]["from"] == [f"gpu:{i}" for i in (0, 2, 3, 4, 5, 7)]
    assert list(third["devices"]) == [f"gpu:{i}" for i in (0, 2, 4, 5, 7)]
    ours = next(row for row in third["policies"] if row["policy"] == "makespan")
    total = third["problem"]["total_bytes"]
    assert ours["kept_bytes"] > 0.8 * total and ours["loaded_bytes"] >= third["problem"]["lost_bytes"] > 0.1 * total
    assert ours["predicted_s"] <= min(row["predicted_s"] for row in third["policies"])


def test_a_policy_whose_plan_does_not_fit_is_said_to_and_hides_no_other(document, run):
    arguments = ("Qwen3-8B", "--lost", "3", "--memory", "1=2.35")
    by_name = {row["policy"]: row for row in document(*arguments)["policies"]}
    assert "gpu:1 would hold 2.4 GB" in by_name["reload"]["refused"] and "predicted_s" in by_name["makespan"]
    status, out, _ = run("plan", *arguments)
    assert status == 0 and "without room: reload, greedy, cmm, units. gpu:1 would hold" in out
    status, out, err = run("plan", *arguments, "--policy", "reload")
    assert (status, out) == (2, "") and "reload: gpu:1 would hold 2.4 GB" in err and "2.4 GB" in err


def test_a_new_device_is_filled_and_widths_follow_speeds(document):
    grown = document("Qwen3-8B", "--from", "3", "--to", "4")
    assert grown["devices"]["gpu:3"]["kept_bytes"] == 0
    slow = document("Qwen3-8B", "--from", "4", "--lost", "0", "--speed", "1=0.5")
    widths = {name: device["widths"]["mlp"] for name, device in slow["devices"].items()}
    assert widths["gpu:1"] == pytest.approx(widths["gpu:2"] / 2, abs=1)


def test_the_kv_cache_moves_from_its_mirror_or_is_replayed(document):
    arguments = ("Qwen3-8B", "--from", "8", "--lost", "3", "--kv-tokens", "100000")
    replayed, mirrored = document(*arguments), document(*arguments, "--kv-mirror", "host")
    assert replayed["problem"]["plane_bytes"] == mirrored["problem"]["plane_bytes"] > 0
    assert replayed["replayed_kv_heads"] == [3]
    assert mirrored["replayed_kv_heads"] == []


def test_a_config_file_and_its_folder_plan_as_the_built_in_shape(document, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "qwen3_moe",
                "num_hidden_layers": 48,
                "hidden_size": 2048,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "moe_intermediate_size": 768,
                "intermediate_size": 6144,
                "num_experts": 128,
                "vocab_size": 151936,
                "torch_dtype": "bfloat16",
            }
        )
    )
    built_in, by_file, by_folder = (document(m, "--lost", "3") for m in (QWEN, str(config), str(tmp_path)))
    assert by_file == by_folder
    assert by_file["problem"].pop("model") != built_in["problem"].pop("model")
    assert by_file == built_in


def test_a_topology_file_decides_where_the_bytes_go(document, tmp_path):
    (tmp_path / "box.yaml").write_text(BOX)
    found = document("Qwen3-8B", "--lost", "a", "--topology", str(tmp_path / "box.yaml"))
    assert found["problem"]["topology"] == "box"
    assert {link["link"] for link in found["links"]} <= {"host>b", "host>c", "b>host", "c>host"}
    assert found["critical"][0]["link"] == "host>c"


def test_the_cli_knows_topologies_that_have_no_file(document):
    assert document("deepseek-v3-like", "--topology", "cluster-2x8", "--lost", "15")["problem"]["to"][-1] == "gpu:14"
    assert len(document("Qwen3-8B", "--topology", "local", "--from", "6", "--lost", "0")["devices"]) == 5


# -------------------------------------------------------------------------------------------------------- output


def test_tables_show_devices_links_time_bound_and_all_policies(run):
    status, out, _ = run("plan", QWEN, "--from", "8", "--to", "7", "--lost", "3")
    assert status == 0
    for text in (
        "8 → 7 devices · lost gpu:3",
        "gpu:7",
        "expert",
        "predicted:",
        "waits for",
        "lower bound:",
        *POLICIES,
    ):
        assert text in out
    assert "gpu:3 " not in out.split("predicted:")[0].split("kept")[1]
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("unit", ["attention:13", "kv:2", "vocab:1000", "expert:12.3", "expert:1539", "replicated"])
def test_explain_says_where_one_unit_comes_from(run, unit):
    status, out, err = run("plan", QWEN, "--from", "8", "--lost", "3", "--explain", unit)
    assert status == 0, err
    assert out.strip()
    assert any(name in out for name in ("gpu:", "host"))


def test_explain_layer_and_expert_or_the_number_of_the_unit(run):
    by_layer = run("plan", QWEN, "--from", "8", "--lost", "3", "--explain", "expert:12.3")
    assert by_layer == run("plan", QWEN, "--from", "8", "--lost", "3", "--explain", f"expert:{12 * 128 + 3}")


def test_plot_is_a_picture_and_stdout_stays_one_document(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    status, out, err = run("plan", QWEN, "--from", "8", "--lost", "3", "--plot", str(path), "--json")
    assert status == 0
    assert str(path) in err
    assert json.loads(out)["policy"] == "makespan"
    png = path.read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1000 and height > 600


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("Qwen9-1B", "--from", "8"), ("Qwen9-1B", "Mixtral-8x22B", "Llama-3.1-70B")),
        (("./nowhere/config.json",), ("./nowhere/config.json", "does not exist")),
        ((QWEN, "--from", "9"), ("--from 9", "8 device")),
        ((QWEN, "--from", "8", "--to", "9"), ("--to 9", "0 more")),
        ((QWEN, "--from", "8", "--lost", "8"), ("--lost 8", "0 to 7")),
        ((QWEN, "--from", "4", "--lost", "gpu:7"), ("gpu:7", "gpu:3")),
        ((QWEN, "--lost", "3,3"), ("gpu:3 twice",)),
        ((QWEN, "--from", "2", "--lost", "0,1"), ("no device is left",)),
        ((QWEN, "--from", "40", "--topology", "cluster-5x8"), ("40 devices", "32 q heads")),
        ((QWEN, "--from", "4", "--lost", "0", "--onto", "0,1"), ("--onto names gpu:0", "lost")),
        ((QWEN, "--from", "4", "--to", "3", "--onto", "0,1"), ("--to 3", "--onto 0,1")),
        ((QWEN, "--from", "4", "--onto", "cpu:1"), ("--onto", "'cpu:1'", "gpu:7")),
        ((QWEN, "--lost", "3", "--already-lost", "5,3"), ("gpu:3", "--already-lost")),
        ((QWEN, "--lost", "0", "--already-lost", "8"), ("--already-lost 8", "0 to 7")),
        ((QWEN, "--from", "2", "--already-lost", "0", "--lost", "1"), ("no device is left",)),
        ((QWEN, "--topology", "dgx-b200"), ("dgx-b200", "dgx-h100", "cluster-NxM")),
        ((QWEN, "--policy", "best"), ("best", "makespan")),
        ((QWEN, "--speed", "0=0"), ("speed of gpu:0", "0")),
        ((QWEN, "--speed", "cpu:0=2"), ("cpu:0", "gpu:0")),
        ((QWEN, "--memory", "lots"), ("lots",)),
        (("Mixtral-8x22B", "--from", "4"), ("GB", "64.0 GB")),
        (("Mixtral-8x22B", "--from", "8", "--lost", "3", "--memory", "38"), ("gpu:", "38")),
        ((QWEN, "--lost", "3", "--explain", "expert:48.0"), ("0 to 47", "0 to 127")),
        ((QWEN, "--lost", "3", "--explain", "attention:32"), ("0 to 31",)),
        ((QWEN, "--lost", "3", "--explain", "mlp:0"), ("Qwen3-30B-A3B", "no unit")),
        ((QWEN, "--lost", "3", "--explain", "plane:0"), ("--kv-tokens",)),
        ((QWEN, "--lost", "3", "--explain", "heads:0"), ("heads:0", "attention:5")),
        ((QWEN, "--lost", "3", "--weights-at", "tape"), ("tape", "mi210-2x4")),
        ((QWEN, "--lost", "3", "--weights-at", "gpu:2"), ("'gpu:2' is a device", "host, disk")),
        ((QWEN, "--lost", "3", "--kv-tokens", "9", "--kv-mirror", "root:0"), ("'root:0' is a switch", "host, disk")),
        ((QWEN, "--lost", "3", "--plot", "/nowhere/plan.png"), ("/nowhere/plan.png",)),
    ],
)
def test_wrong_input_is_one_line_that_names_it(run, arguments, named):
    status, out, err = run("plan", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("anchortp: ") and err.count("\n") == 1, err
    for text in named:
        assert text in err


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[host, a]", "[host, d]", "'d' is not a place"),
        ("  - {between: [host, c], gb_per_s: 5}\n", "", "c cannot be reached"),
        ("gb_per_s: 5", "gb_per_s: -5", "-5"),
        ("gb_per_s: 5", "speed: 5", "speed"),
        ("kind: host", "kind: toast", "toast"),
        ("[host, a], gb", "[host, a, gb", "not YAML"),
        (BOX, "[]", "mapping"),
        (BOX, "", "mapping"),
    ],
)
def test_a_wrong_topology_file_is_one_line_that_names_it(run, tmp_path, old, new, named):
    path = tmp_path / "box.yaml"
    path.write_text(BOX.replace(old, new))
    status, out, err = run("plan", "Qwen3-8B", "--topology", str(path))
    assert (status, out) == (2, "")
    assert err.startswith(f"anchortp: {path}") and err.count("\n") == 1, err
    assert named in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[]", "mapping"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "llama"}', "hidden_size"),
    ],
)
def test_a_wrong_config_file_is_one_line_that_names_it(run, tmp_path, text, named):
    path = tmp_path / "config.json"
    path.write_text(text)
    status, _, err = run("plan", str(path))
    assert status == 2
    assert err.startswith(f"anchortp: {path}") and err.count("\n") == 1, err
    assert named in err


# ------------------------------------------------------------------------------------------------------ topology


@pytest.mark.parametrize("found", [*(preset(name) for name in PRESETS), cluster(2, 3)], ids=lambda t: t.name)
def test_yaml_of_a_topology_reads_back_equal(found, tmp_path):
    path = tmp_path / "topology.yaml"
    path.write_text(topologies.as_yaml(found, ("a comment",)))
    read = topologies.load_topology(str(path))
    assert (read.name, read.places, read.weights_at) == (found.name, found.places, found.weights_at)
    assert [(link.src, link.dst) for link in read.links] == [(link.src, link.dst) for link in found.links]
    for link, original in zip(read.links, found.links, strict=True):
        assert link.bytes_per_s == pytest.approx(original.bytes_per_s)
        assert link.latency_s == pytest.approx(original.latency_s)
    assert parse_topology(topologies.as_raw(read)) == read


def test_show_prints_places_and_links_or_yaml(run, tmp_path):
    status, out, _ = run("topology", "show", "mi210-2x4")
    assert status == 0
    assert all(text in out for text in ("root:1", "64.0 GB", "42.5 GB/s"))
    status, out, _ = run("topology", "show", "pcie-4", "--yaml")
    (tmp_path / "pcie.yaml").write_text(out)
    assert topologies.load_topology(str(tmp_path / "pcie.yaml")).name == "pcie-4"


def test_measure_writes_a_topology_that_plan_reads(run, document, tmp_path):
    path = tmp_path / "here.yaml"
    arguments = ("--devices", "3", "--size", "4M", "--folder", str(tmp_path), "--output", str(path))
    status, out, err = run("topology", "measure", *arguments)
    assert (status, out) == (0, ""), err
    assert list(tmp_path.iterdir()) == [path]  # the file that was read is gone
    found = document("Qwen3-8B", "--lost", "0", "--topology", str(path))
    assert found["problem"]["topology"] == "local"
    assert list(found["devices"]) == ["cpu:1", "cpu:2"]
    assert initial_layout(SHAPES["Qwen3-8B"], topologies.load_topology(str(path)).devices)


def test_measure_refuses_a_folder_that_does_not_exist(run, tmp_path):
    status, out, err = run("topology", "measure", "--size", "1M", "--folder", str(tmp_path / "nowhere"))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and "nowhere" in err
