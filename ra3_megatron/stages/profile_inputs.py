"""What a profiled stage works on: what a run of the same configuration has made already, or a small part made anew.

Nothing is written into the run's stages. Weights that are not there yet are random: how long a step takes depends on
them through the lengths of thoughts and answers alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig, config_differences, load_config
from ra3_megatron.config.sections import ReportConfig
from ra3_megatron.config.validate import Layout
from ra3_megatron.data.prepare import PreparedCorpus, open_prepared
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.generate import open_bootstrapped
from ra3_megatron.stages.graph import Node, find, graph
from ra3_megatron.stages.inputs import import_model, prepare_corpus
from ra3_megatron.stages.rlvr import Rlvr, RlvrInputs
from ra3_megatron.stages.rlvr_tasks import RlvrTasks, TaskReader, open_tasks, prepare_tasks
from ra3_megatron.stages.run_folder import RunFolder, StageFolder
from ra3_megatron.stages.sft import SftInputs, Trainer
from ra3_megatron.stages.start import start_checkpoint
from ra3_megatron.stages.variational import EStep, VariationalInputs

TRAINING = ("ntp", "variational", "sft", "rlvr")
"""Kinds of stages that can be profiled."""

NEVER = 10**9
"""Steps between checkpoints and measurements that do not come."""

BYTES_PER_TOKEN = 4
SPARE = 16
"""A corpus is cut to this many times what the steps read: filters and the split leave enough."""

_SAME = ("run.arms", "run.rounds", "model.", "data.", "base.", "latent.format", "train.seq_length")
"""Settings that what an earlier run has made depends on; its tasks on those of `rlvr` too."""


def choose_stage(config: RunConfig, kind: str | None, arm: str | None, round: int | None) -> Node:
    """The stage that `--stage`, `--arm`, `--round` mean; the run's first that trains unless given.

    Raises UserError for one that does not train.
    """
    if kind is None:
        node = next((n for n in graph(config) if n.kind in TRAINING), None)
        if node is None:
            raise UserError("this run trains nothing that could be profiled; set run.arms or rlvr.steps")
        return node
    if kind not in TRAINING:
        raise UserError(f"--stage {kind} cannot be profiled; give one that trains: {', '.join(TRAINING)}")
    return find(config, kind, arm, round)


def profiled_config(config: RunConfig, folder: Path, steps: int, layout: Layout) -> RunConfig:
    """The configuration of a stage that could take `steps` steps and a few more, in `folder`.

    No measurements, checkpoints or trackers; the corpus no larger than the steps need.
    """
    v, r, corpus = config.variational, config.rlvr, config.data.corpus
    needed = SPARE * BYTES_PER_TOKEN * layout.tokens_per_step * (steps + 1)
    cut = max(needed, 2_000_000) if corpus.limit_bytes is None else min(corpus.limit_bytes, max(needed, 2_000_000))
    more = steps + 1 + max(v.max_lag, r.max_lag)
    return replace(
        config,
        run=replace(config.run, dir=str(folder)),
        data=replace(config.data, corpus=replace(corpus, limit_bytes=cut)),
        train=replace(config.train, steps=more, tokens=None, epochs=None, eval_interval=0, eval_windows=1),
        optimizer=replace(config.optimizer, warmup_steps=0),
        variational=replace(v, steps=more, warmup_steps=0, flat_window=0, probe_snippets=0, checkpoint_interval=NEVER),
        rlvr=replace(r, steps=more, warmup_steps=0, eval_interval=0, checkpoint_interval=NEVER) if r.steps else r,
        checkpoint=replace(config.checkpoint, interval=NEVER),
        report=ReportConfig(interval=NEVER, tensorboard=False),
    )


@dataclass(frozen=True)
class Profiled:
    """A stage, ready to begin."""

    stage: Trainer | EStep | Rlvr
    weights: str
    """Where its weights come from, in words."""
    attended: float
    """Keys a query attends to on average, as the stage itself reckons."""


def build_stage(context: Context, config: RunConfig, node: Node) -> Profiled:
    """The stage `node` of the run of `config`; `context` has the configuration of `profiled_config` and its folder."""
    sources = _Sources(context, config)
    weights, said = sources.weights(node)
    folder = StageFolder(context.folder.path / node.name)
    if node.kind == "rlvr":
        hf = sources.hf_folder(weights)
        tasks = replace(sources.tasks(hf), validation=())
        rlvr = Rlvr(context, folder, RlvrInputs(tasks, hf, weights))
        return Profiled(rlvr, said, rlvr.basis.longest_row / 2)
    corpus, hf = sources.corpus(node), sources.hf_folder(weights)
    if node.kind == "variational":
        whole = node.arm == "brite"
        step = EStep(context, folder, VariationalInputs(corpus, hf, weights, node.round, whole_block=whole))
        return Profiled(step, said, float(corpus.train.lengths.mean()) / 2)
    return Profiled(
        Trainer(context, folder, SftInputs(corpus, hf, weights, corpus)), said, context.config.train.seq_length / 2
    )


class _Sources:
    """Where things lie: in the run's own folder when it has made them with the same settings, else in the profile's."""

    def __init__(self, context: Context, config: RunConfig) -> None:
        self._context, self._config = context, config
        self._work = context.folder.path
        self._nodes = {node.name: node for node in graph(config)}
        self._done: dict[str, str] = context.on_main("what the run has made", self._earlier)

    def _earlier(self) -> dict[str, str]:
        """Folders of the run's finished stages, by name; none when its settings were others."""
        run = RunFolder(Path(self._config.run.dir))
        saved = run.path / "config.yaml"
        if not saved.is_file():
            return {}
        differences = config_differences(load_config(saved), self._config)
        other = [d for d in differences if d.startswith(_SAME)]
        if other:
            self._context.say(f"{run.path} was made with other settings ({'; '.join(other)}); nothing of it is used")
            return {}
        stages = {name: run.stage(number, name) for number, name in enumerate(self._nodes)}
        if any(d.startswith("rlvr.") for d in differences):
            stages.pop("tasks", None)
        return {name: str(stage.path) for name, stage in stages.items() if stage.done}

    def _made(self, name: str) -> StageFolder | None:
        return StageFolder(Path(self._done[name])) if name in self._done else None

    # ---------------------------------------------------------------- weights

    def weights(self, node: Node) -> tuple[Path | None, str]:
        """Checkpoint that the stage starts from, or the nearest one there is; none = random weights. And in words."""
        for name in self._wanted(node):
            if name == "import":
                return self._imported(), "the base model's"
            if (stage := self._made(name)) is not None:
                checkpoint = self._context.on_main("weights", stage.result)["checkpoint"]
                return Path(self._config.run.dir) / checkpoint, f"those that stage {name} of the run left"
        if self._config.rlvr.start is not None and node.kind == "rlvr":
            return start_checkpoint(self._config), f"those of rlvr.start {self._config.rlvr.start}"
        return None, "random: the stages before have not run"

    def _wanted(self, node: Node) -> list[str]:
        """Stages whose weights would do, the right one first."""
        trained = [n for n in reversed(node.needs) if self._nodes[n].kind in ("variational", "sft", "ntp")]
        if node.kind == "sft" and self._config.train.init == "base":
            trained = [n for n in trained if self._nodes[n].kind != "variational"]
        return [n for n in (*trained, "base", "import") if n in self._nodes]

    def _imported(self) -> Path:
        return self._import_stage().path / "checkpoint"

    def _import_stage(self) -> StageFolder:
        """The converted base model: of the run, or converted here."""
        if (made := self._made("import")) is not None:
            return made
        stage = StageFolder(self._work / "import")
        self._context.run_once(stage, "import", lambda s: import_model(self._context, s))
        return stage

    # ---------------------------------------------------------------- data

    def _prepared(self) -> StageFolder:
        """The corpus without thoughts: of the run, or a part of it prepared here."""
        if (made := self._made("prepare")) is not None:
            return made
        stage = StageFolder(self._work / "prepare")
        if not stage.done:
            imported = self._import_stage() if "import" in self._nodes else None
            prepare_corpus(self._context, stage, imported)
        return stage

    def corpus(self, node: Node) -> PreparedCorpus:
        """What the stage trains on; code without thoughts where none have been drawn yet."""
        infused = next((n for n in node.needs if self._nodes[n].kind == "generate"), "")
        if node.kind == "sft" and (made := self._made(infused)) is not None:
            return open_bootstrapped(made.path)
        return open_prepared(self._prepared().path / "data" / "corpus")

    def hf_folder(self, weights: Path | None) -> Path:
        """config.json and tokenizer."""
        if "prepare" in self._nodes:
            return self._prepared().path / "hf"
        assert weights is not None, "validation lets no run be without a corpus and a model"
        return weights / "hf"

    def tasks(self, hf: Path) -> RlvrTasks:
        """Tasks of RLVR, as the run chose them or chosen here."""
        reader = TaskReader(self._context.config, hf.parent)
        if (made := self._made("tasks")) is not None:
            return open_tasks(reader, made.path)
        stage = StageFolder(self._work / "tasks")
        self._context.run_once(stage, "tasks", lambda s: prepare_tasks(self._context, s, reader))
        return open_tasks(reader, stage.path)
