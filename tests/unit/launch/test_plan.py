"""The jobs of a run and their order, the commands they are submitted with, the arithmetic of large layouts."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.config.run import RunConfig, config_from_dict, load_config
from ra3_megatron.launch.command import check_layouts, for_a_replica, launch
from ra3_megatron.launch.folder import LaunchFolder, snapshot
from ra3_megatron.launch.plan import plan
from ra3_megatron.launch.settings import Settings, job_variables, load_settings
from ra3_megatron.launch.slurm import clean_environment, own_id
from ra3_megatron.launch.step import Step, container, port_of, process_environment, start_command
from ra3_megatron.launch.submit import environment, job_name, sbatch_command
from ra3_megatron.stages.graph import graph

ROOT = Path(__file__).parents[3]


def config(**sections) -> RunConfig:
    base = {"run": {"arms": ["ra3", "ntp"], "rounds": 2}, "base": {"tokens": 100}, "train": {"tokens": 1000}}
    return config_from_dict({**base, **sections})


def test_every_stage_has_a_job_and_waits_for_what_it_needs():
    """A stage that was started before its input was there, or never."""
    jobs = plan(config(), Settings(nodes=4, array=16))
    names = [job.name for job in jobs]
    nodes = graph(config())
    assert [name for name in names if not name.endswith("-join")] == [f"{i:02d}-{n.name}" for i, n in enumerate(nodes)]
    for i, job in enumerate(jobs):
        assert set(job.after) <= set(names[:i]), job
    by_name = {job.name: job for job in jobs}
    (sft,) = [job for job in jobs if job.name.endswith("ra3-sft-2")]
    assert any(name.endswith("ra3-generate-2-join") for name in sft.after), "the joined corpus, not its shards"
    (join,) = [job for job in jobs if job.name.endswith("ra3-generate-1-join")]
    assert join.after == (join.stage,)
    assert by_name[join.stage].array == 16
    scripts = {job.name.split("-", 1)[1]: job.script for job in jobs}
    assert scripts["prepare"] == scripts["export"] == scripts["ra3-generate-1-join"] == "convert.sh"
    assert scripts["ra3-variational-1"] == "rlvr.sh"
    assert scripts["ntp"] == scripts["ra3-sft-1"] == scripts["measure"] == scripts["base"] == "midtrain.sh"


def test_sizes_of_jobs():
    """One process was given all nodes, or all processes one GPU."""
    jobs = {job.name: job for job in plan(config(), Settings(nodes=4, spares=1, array=3, array_nodes=2))}
    prepare = jobs["00-prepare"]
    assert (prepare.nodes, prepare.spares, prepare.processes, prepare.gpus) == (1, 0, 1, 1)
    base = next(job for name, job in jobs.items() if name.endswith("-base") and "prepare" not in name)
    assert (base.nodes, base.spares, base.processes, base.gpus) == (4, 1, 8, 8)
    generate = next(job for name, job in jobs.items() if name.endswith("generate-1"))
    assert (generate.nodes, generate.spares, generate.array) == (2, 0, 3)


def test_command_of_a_job(tmp_path):
    """What a site decides (account, partition) must not be in it; what we decide must."""
    folder = LaunchFolder(tmp_path / "run")
    (spec,) = [job for job in plan(config(), Settings(nodes=2)) if job.name.endswith("-ntp")]
    command = sbatch_command(folder, spec, Settings(nodes=2, time="08:00:00", grace_s=400), ["11", "12"])
    assert "--dependency=afterok:11:12" in command
    assert "--kill-on-invalid-dep=yes" in command, "without it what depends on a failed job waits for ever"
    assert "--signal=B:USR1@400" in command, "without B: it kills every process of the step"
    assert "--open-mode=append" in command, "without it a requeue empties the log"
    assert not [c for c in command if c.startswith(("--account", "--partition", "--export"))]
    assert command[-5:] == [str(tmp_path / "run"), "--stage", "ntp", "--arm", "ntp"]
    assert job_name(folder.run, spec) != job_name(tmp_path / "other" / "run", spec), "two runs of one name"
    with_options = sbatch_command(folder, spec, Settings(sbatch=("--exclusive",)), [])
    assert "--exclusive" in with_options
    assert not [c for c in with_options if c.startswith("--dependency")]


def test_environment_of_a_job(tmp_path):
    """--export=ALL writes the keys of the shell into Slurm's record; an outer job's variables shape the new one."""
    outer = {
        "PATH": "/bin", "WANDB_API_KEY": "x", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "DB_PASSWORD": "x",
        "SLURM_NTASKS": "8", "SLURM_MEM_PER_NODE": "1", "SRUN_CPUS_PER_TASK": "2", "SBATCH_NODELIST": "n1",
        "SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/etc/x", "RA3_CONTAINER": "pyxis:x", "RA3_ATTEMPT_DIR": "/old",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    assert set(clean_environment(outer)) == {
        "PATH", "SBATCH_ACCOUNT", "SLURM_CONF", "RA3_CONTAINER", "TOKENIZERS_PARALLELISM",
    }  # fmt: skip
    made = environment(LaunchFolder(tmp_path), Settings(restart="copies", grace_s=90))
    assert (made["RA3_RESTART"], made["RA3_GRACE_S"]) == ("copies", "90")


def test_an_element_is_named_by_itself():
    """The last element's SLURM_JOB_ID is the array's own: requeuing it requeued all."""
    assert own_id({"SLURM_JOB_ID": "7"}) == "7"
    assert own_id({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == "7_2"


def test_settings_survive_and_nonsense_does_not(tmp_path):
    """A resumed chain was shaped by defaults."""
    settings = Settings(nodes=3, sbatch=("--exclusive", "--mem=0"), restart="copies")
    settings.save(tmp_path / "settings.json")
    assert load_settings(tmp_path / "settings.json") == settings
    with pytest.raises(UserError, match="nodes = 0"):
        Settings(nodes=0)
    with pytest.raises(UserError, match=r"no .*settings\.json"):
        load_settings(tmp_path / "no" / "settings.json")
    with pytest.raises(UserError, match="RA3_SPARES is 'two'"):
        job_variables({"RA3_SPARES": "two"})
    with pytest.raises(UserError, match="RA3_LAUNCHER"):
        job_variables({"RA3_LAUNCHER": "mpirun"})
    assert job_variables({"RA3_CHECK_ALLREDUCE_GB_S": "2.5", "RA3_SPARES": ""}).check_allreduce_gb_s == 2.5


def test_layouts_over_512_processes():
    """Arithmetic at full size: what divides is told, what does not is refused before anything is queued."""
    architecture = {
        "family": "llama", "num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
        "ffn_hidden_size": 14336, "vocab_size": 128256, "tied_embeddings": False, "max_positions": 8192,
    }  # fmt: skip
    layouts = {(8, 1, 1): 64, (4, 2, 1): 64, (8, 4, 2): 8, (1, 1, 1): 512, (2, 8, 4): 8}
    for (tensor, pipeline, context), data in layouts.items():
        c = config_from_dict(
            {
                "run": {"arms": ["ntp"]},
                "model": {"architecture": architecture},
                "parallel": {"tensor": tensor, "pipeline": pipeline, "context": context},
                "train": {"tokens": 1_000_000, "seq_length": 4096, "global_batch_size": 1024},
            }
        )
        lines = check_layouts(c, Settings(nodes=64), c.model.architecture)
        assert len(lines) == 1, "nothing is generated: no array to check"
        expected = f"512 processes = tensor {tensor} x pipeline {pipeline} x context {context} x data {data};"
        assert expected in lines[0]
        assert f"{1024 // data} micro-batches, {1024 * 4096:,} tokens a step" in lines[0]
    with pytest.raises(UserError, match="global_batch_size"):
        check_layouts(
            config_from_dict(
                {
                    "run": {"arms": ["ntp"]},
                    "model": {"architecture": architecture},
                    "train": {"tokens": 1_000_000, "global_batch_size": 500},
                }
            ),
            Settings(nodes=64),
            c.model.architecture,
        )


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.2-1b", "llama-3.1-8b", "qwen3-30b-a3b"])
def test_cluster_configurations_are_whole_chains(name, tmp_path, monkeypatch):
    """The shipped files once trained the baseline alone; and a launch without their data was queued for nothing."""
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parents[3] / "configs" / f"{name}.yaml"
    told = launch(path, [], Settings(nodes=16), dry_run=True)
    order = ["import", "prepare", "tasks", "ra3-variational-1", "ra3-generate-1", "ra3-sft-1", "ra3-rlvr", "export",
             "measure", "evaluate"]  # fmt: skip
    places = [told.index(f"-{stage}: planned") for stage in order]
    assert places == sorted(places)
    assert "evaluation.data_dir" in told
    with pytest.raises(UserError, match=r"model\.source.*rlvr\.tasks"):
        launch(path, [], Settings(nodes=16))
    assert not list(tmp_path.iterdir())


def _experts_over_512(sizes: dict[str, object], **sections: object) -> list[str]:
    alone = ["run.arms=[ntp]", "rlvr.steps=0", "evaluation.benchmarks=[]"]
    c = load_config(ROOT / "configs" / "qwen3-30b-a3b.yaml", alone)
    c = replace(c, parallel=replace(c.parallel, **{"expert_tensor": None, **sizes}), **sections)
    return check_layouts(c, Settings(nodes=64), c.model.architecture)


@pytest.mark.parametrize(
    ("sizes", "data", "experts"),
    [
        # tensor x context x data processes of a stage = expert-tensor x expert x expert-data, by hand.
        ({"tensor": 4, "pipeline": 2, "expert": 4, "expert_tensor": 1}, 64, (1, 4, 64, 256)),
        ({"tensor": 4, "pipeline": 4, "context": 2, "expert": 8}, 16, (4, 8, 4, 128)),
        ({"tensor": 2, "pipeline": 8, "context": 4, "expert": 64, "expert_tensor": 1}, 8, (1, 64, 1, 64)),
        ({"tensor": 1, "pipeline": 4, "sequence": False, "expert": 128}, 128, (1, 128, 1, 128)),
        ({"tensor": 4, "pipeline": 1, "expert": 8, "expert_tensor": 2}, 128, (2, 8, 32, 512)),
    ],
)
def test_experts_over_512_processes(sizes, data, experts):
    """TP, PP, CP, DP and EP at full size: the two ways a stage's processes divide must be told, and agree."""
    (line,) = _experts_over_512(sizes)
    tensor, expert, replicas, stage = experts
    assert "64 nodes x 8 = 512 processes" in line
    assert f"context {sizes.get('context', 1)} x data {data};" in line
    told = f"expert-tensor {tensor} x expert {expert} x expert-data {replicas} of the {stage} processes of a stage"
    assert told in line
    assert tensor * expert * replicas == stage == 512 // sizes["pipeline"]


SAMPLES = EvaluationConfig(benchmarks=("humaneval",))


@pytest.mark.parametrize(
    ("sizes", "sections", "words"),
    [
        ({"expert": 256, "expert_tensor": 1}, {}, r"expert \(256\) does not divide .*num_experts \(128\).* is 128"),
        ({"expert": 96}, {}, r"4 x expert 96 = 384 does not divide the 256 processes .*context 1 x data 64.* is 64$"),
        ({"expert": 2, "expert_tensor": 3}, {}, "expert_tensor 3 with tensor 4"),
        ({"expert": 4, "sequence": False}, {}, r"128 experts and parallel.tensor is 4.*sequence=true"),
        ({"expert": 0}, {}, "parallel.expert is 0"),
        ({"expert": 8, "expert_tensor": 1}, {"evaluation": SAMPLES}, r"reaches over replicas of tensor 4"),
    ],
)
def test_experts_that_do_not_fit_512_processes(sizes, sections, words):
    """Megatron's assertion, on the 512th GPU and after the queue, named neither the sizes nor a cure."""
    with pytest.raises(UserError, match=words) as refused:
        _experts_over_512(sizes, **sections)
    assert "\n" not in str(refused.value)


EIGHT_B = ROOT / "configs" / "llama-3.1-8b.yaml"


def dry(tmp_path, *arguments, gpu_memory=0.0, nodes=64):
    """What `ra3 launch configs/llama-3.1-8b.yaml --nodes 64 --dry-run` prints, or why it refuses."""
    shape = Settings(nodes=nodes, gpu_memory_gib=gpu_memory)
    return launch(EIGHT_B, [f"run.dir={tmp_path / 'run'}", *arguments], shape, dry_run=True)


def test_the_8b_configuration_on_512_gpus(tmp_path):
    """A layout that cannot be was found out after hours in the queue, by 512 processes at once."""
    told = dry(tmp_path)
    assert "a job: 64 nodes x 8 = 512 processes = tensor 4 x pipeline 1 x context 1 x data 128;" in told
    assert "an element of the array: 1 nodes x 8 = 8 processes = tensor 4 x pipeline 1 x context 1 x data 2;" in told
    (memory,) = re.findall(r"memory of the fullest process: about ([\d.]+) GiB", told)
    assert 8e9 / 4 * (2 + 4) / 2**30 < float(memory) < 60, "weights and gradients of a quarter of the model at least"
    refused = {
        "parallel.tensor=3": "but 512 were started",
        "parallel.tensor=16": "does not divide model.architecture.num_kv_heads",
        "parallel.pipeline=64": "does not divide model.architecture.num_layers",
        "parallel.data=100": "leaves 128",
        "train.global_batch_size=192": "use 256",
    }
    for change, words in refused.items():
        with pytest.raises(UserError) as found:
            dry(tmp_path, change)
        assert words in str(found.value), change
    with pytest.raises(UserError, match=r"needs about .* GiB and a GPU has 16 "):
        dry(tmp_path, gpu_memory=16.0)
    assert dry(tmp_path, gpu_memory=80.0) == told
    assert not (tmp_path / "run").exists()


def test_rlvr_alone_has_the_shape_of_its_start(tmp_path):
    """The layout of a run from a checkpoint was not looked at before hours in the queue."""
    c = load_config(EIGHT_B)
    start = tmp_path / "start"
    start.mkdir()
    (start / "architecture.json").write_text(json.dumps(c.model.architecture.to_dict()))
    (start / "DONE").write_text("{}")
    path = tmp_path / "config.yaml"
    replace(c, model=replace(c.model, source=None, architecture=None)).save(path)
    alone = ["run.arms=[]", f"run.dir={tmp_path / 'run'}", f"rlvr.start={start}"]
    told = launch(path, alone, Settings(nodes=4), dry_run=True)
    assert "a job: 4 nodes x 8 = 32 processes = tensor 4 x pipeline 1 x context 1 x data 8;" in told
    assert re.findall(r"^\d\d-([\w-]+): planned", told, re.MULTILINE) == ["tasks", "rlvr", "export", "evaluate"]
    with pytest.raises(UserError, match="does not divide"):
        launch(path, [*alone, "parallel.tensor=16"], Settings(nodes=4), dry_run=True)


def test_an_element_of_the_array_holds_a_replica(tmp_path):
    """A replica of two nodes was refused, since the elements of the array had one unless told otherwise."""
    c = config(parallel={"tensor": 4, "pipeline": 4})
    assert for_a_replica(c, Settings(nodes=4)).array_nodes == 2
    assert for_a_replica(c, Settings(nodes=4, processes_per_node=3)).array_nodes == 6
    assert for_a_replica(c, Settings(nodes=4, array_nodes=3)).array_nodes == 3


def test_ports_differ_between_jobs_and_attempts():
    """Two jobs on a node took the same port, and both died."""
    ports = {port_of(job, restart) for job in range(1000, 1100) for restart in range(5)}
    assert len({port_of(job, 0) for job in range(1000, 3000)}) == 2000
    assert all(12000 <= port < 32000 for port in ports), "below what kernels hand out"


STEP = Step(("n1", "n2"), 4, 12345, Path("/run/jobs/x/7-0"), (Path("/run"), Path("/code")))


def test_start_with_srun(monkeypatch):
    """A rank that died left the others running, since the cluster's default is to let them."""
    command = start_command(STEP, job_variables({"RA3_PYTHON": "/py"}), ["ra3_megatron", "midtrain", "a b"])
    assert {"--kill-on-bad-exit=1", "--ntasks=8", "--nodelist=n1,n2", "--input=none"} <= set(command)
    assert command[-5:] == ["/py", "-m", "ra3_megatron", "midtrain", "a b"]


def test_start_with_torchrun_and_ft(tmp_path, monkeypatch):
    """One agent per node, who starts the processes and restarts them inside the job."""
    variables = job_variables({"RA3_LAUNCHER": "torchrun", "RA3_PYTHON": "/py", "RA3_MAX_RESTARTS": "2"})
    command = start_command(STEP, variables, ["ra3_megatron", "midtrain"])
    assert "--ntasks=2" in command
    start = command.index("/py")
    assert command[start : start + 3] == ["/py", "-m", "torch.distributed.run"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=n1:12345", "--max-restarts=2"} <= set(command)
    assert process_environment(STEP, "torchrun")["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1", "a store per restart"
    assert process_environment(STEP, "srun")["MASTER_ADDR"] == "n1"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="nvidia-resiliency-ext"):
        start_command(STEP, job_variables({"RA3_LAUNCHER": "ft"}), [])
    (tmp_path / "ft_launcher").write_text("#!/bin/sh\n")
    (tmp_path / "ft_launcher").chmod(0o755)
    assert "ft_launcher" in start_command(STEP, job_variables({}), []), "used where it is installed"
    assert "ft_launcher" not in start_command(STEP, job_variables({"RA3_LAUNCHER": "srun"}), [])


def test_containers():
    """An image of another kind was run outside of any container."""
    flags, prefix = container(
        job_variables({"RA3_CONTAINER": "pyxis:img", "RA3_CONTAINER_MOUNTS": "/d:/d"}), STEP.mounts
    )
    assert "--container-image=img" in flags
    assert "--container-mounts=/run:/run,/code:/code,/d:/d" in flags
    assert not prefix
    flags, prefix = container(job_variables({"RA3_CONTAINER": "apptainer:/i.sif"}), STEP.mounts)
    assert not flags
    assert prefix[:3] == ["apptainer", "exec", "--nv"]
    assert prefix[-1] == "/i.sif"
    with pytest.raises(UserError, match="RA3_CONTAINER"):
        container(job_variables({"RA3_CONTAINER": "docker:img"}), STEP.mounts)


def test_snapshot_is_whole_and_kept(tmp_path):
    """A run that was resumed after a pull trained with other code than it began with."""
    snapshot(ROOT, tmp_path / "code")
    assert (tmp_path / "code" / "slurm" / "midtrain.sh").stat().st_mode & 0o100
    assert (tmp_path / "code" / "ra3_megatron" / "launch" / "folder.py").exists()
    assert not list((tmp_path / "code").rglob("__pycache__"))
    assert (tmp_path / "code" / "COMMIT").read_text().strip()
    folder = LaunchFolder(tmp_path / "run")
    (folder.code).mkdir(parents=True)
    (folder.code / "COMMIT").write_text("abc\n")
    folder.write(config())
    assert folder.commit() == "abc"


def test_scripts_of_a_snapshot_find_their_python(tmp_path):
    """The snapshot has no .venv: its status.sh, which a launch tells one to run, took the system's older Python."""
    run, bin_ = tmp_path / "run", tmp_path / "bin"
    bin_.mkdir()
    for name in ("python3", "squeue"):
        (bin_ / name).write_text("#!/bin/sh\n" + ("exit 0\n" if name == "squeue" else "echo wrong Python; exit 3\n"))
        (bin_ / name).chmod(0o755)
    folder = LaunchFolder(run)
    run.joinpath("launch").mkdir(parents=True)
    folder.write(replace(config(), run=replace(config().run, dir=str(run))))
    Settings(nodes=1).save(folder.settings)
    env = {"PATH": f"{bin_}:/usr/bin:/bin"}
    script = folder.code / "slurm" / "status.sh"
    done = subprocess.run([script, run], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "00-" in done.stdout


def test_no_torch_on_the_login_node():
    """Submitting took ten seconds, or failed where torch is only in the container."""
    modules = [f"ra3_megatron.launch.{p.stem}" for p in (ROOT / "ra3_megatron" / "launch").glob("*.py")]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; " \
           "print({'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_sound(script):
    """A slip of the shell was met after hours in the queue; a site's own names were in a script."""
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [str(shellcheck), "--external-sources", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    lines = script.read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    assert all(i < first for i in directives), "Slurm reads no directive after the first command"
    assert not [line for line in lines if line.startswith("#SBATCH") and any(
        word in line for word in ("account", "partition", "nodes", "--time", "gpus", "output"))]  # fmt: skip
