"""The main job: the stages of a run, in the order of its graph, each skipped when it is done.

base model → for every arm and round: E-step → generation → fine-tuning; RLVR of every arm, or of the base alone →
export, held-out measurement, evaluation on benchmarks, report.
"""

import logging
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.data.prepare import PreparedCorpus, open_prepared
from ra3_megatron.model.factory import choose_layers
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.parallel.launch import launch_from_env
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.dry_run import declared_architecture
from ra3_megatron.stages.evaluate import EvaluateInputs, run_evaluate
from ra3_megatron.stages.files import missing_files, refuse_missing, undone
from ra3_megatron.stages.generate import GenerateInputs, Part, open_bootstrapped, run_generate
from ra3_megatron.stages.graph import ONE_PROCESS, Node, find, graph
from ra3_megatron.stages.inputs import export_model, import_model, prepare_base, prepare_corpus
from ra3_megatron.stages.interrupt import listen, sign_in
from ra3_megatron.stages.measure import ArmOutcome, MeasureInputs, run_measure
from ra3_megatron.stages.rlvr import RlvrInputs, run_rlvr
from ra3_megatron.stages.rlvr_tasks import TaskReader, open_tasks, prepare_tasks
from ra3_megatron.stages.run_folder import RunFolder, StageFolder
from ra3_megatron.stages.sft import SftInputs, run_sft
from ra3_megatron.stages.start import start_checkpoint
from ra3_megatron.stages.variational import VariationalInputs, run_variational


@dataclass(frozen=True)
class Only:
    """One stage to run alone, as a job of a chain does."""

    stage: str
    """Kind of stage, such as `generate`."""
    arm: str | None = None
    """Arm; none = the first that has such a stage."""
    round: int | None = None
    """EM round, from 1; none = the first."""
    part: Part | None = None
    """For `generate`: draw this part of the shards alone, and join nothing."""


def run(config: RunConfig, accept_changes: bool = False, only: Only | None = None) -> Path:
    """Run or go on with the run in `run.dir`, whole or one stage of it; returns the path of its report.

    Everything that can be refused is refused before a process group or a file is made.
    """
    launch = launch_from_env()
    chosen = graph(config) if only is None else (find(config, only.stage, only.arm, only.round),)
    refuse_missing(missing_files(config, undone(config, Path(config.run.dir), chosen)))
    architecture, _ = declared_architecture(config)
    sizes = _sizes(config, only, launch.world)
    splits = any(node.kind in SPLITTING for node in chosen)
    layout = resolve_layout(replace(config, parallel=sizes), launch.world, architecture, splits)
    choose_layers(config.model)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # Megatron's advice to its callers about deprecated and experimental parts is nothing a user could follow.
    logging.getLogger("megatron.core.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    listen()
    sign_in(launch.rank)
    with initialize(sizes, launch) as parallel, ExitStack() as held:
        context = Context(config, architecture, layout, parallel, RunFolder(Path(config.run.dir)))

        def claim() -> None:
            held.enter_context(context.folder.locked(_work(chosen[0], only) if only else ""))
            context.folder.claim(config, accept_changes)

        context.on_main("configuration", claim)
        job = _Job(context, only.part if only else None)
        for node in chosen:
            context.interrupt.begin(node.name, None if node.kind in STEPPING else config.parallel.setup_timeout_s)
            job.run(node)
        context.interrupt.begin("report")
        report = context.on_main("report", lambda: _report(context.folder.path))
        job.say_results(report)
        return report


def _report(run: Path) -> Path:
    # Not at the top: the process that draws the report needs matplotlib, and the others would wait for it at the start.
    from ra3_megatron.report.run_report import build_report

    return build_report(run)


def parse_part(text: str | None, stage: str | None) -> Part | None:
    """`3/16` as part 3 of the parts 0 to 15. Raises UserError for anything else, and for stages without shards."""
    if text is None:
        return None
    if stage != "generate":
        raise UserError(f"--part {text} without --stage generate; only its shards are shared between jobs")
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UserError(f"--part {text}; give number/count, the number from 0 to count - 1, such as 3/16")
    return Part(int(number), int(count))


STEPPING = ("base", "ntp", "variational", "sft", "rlvr")
"""Stages whose loop is heard of at every step; others may be silent as long as a setting up may take."""

SPLITTING = ("variational", "rlvr")
"""Stages that `parallel.generation_replicas` divides."""


def _sizes(config: RunConfig, only: Only | None, world: int) -> ParallelConfig:
    """The run's parallel sizes, or none at all for one process that does what needs no more."""
    join = only is not None and only.stage == "generate" and only.part is None
    if world > 1 or only is None or not (only.stage in ONE_PROCESS or join):
        return config.parallel
    return replace(config.parallel, tensor=1, pipeline=1, virtual_pipeline=None, context=1, data=None, sequence=False)


def _work(node: Node, only: Only) -> str:
    """Name of what a job does alone in the run's folder."""
    return node.name if only.part is None else f"{node.name}-{only.part.number}"


def status(config: RunConfig) -> str:
    """Where the run in `run.dir` stands: a line per stage."""
    folder = RunFolder(Path(config.run.dir))
    nodes = graph(config)
    width = max(len(node.name) for node in nodes)
    done = {node.name for number, node in enumerate(nodes) if folder.stage(number, node.name).done}
    lines = [f"{config.run.dir}: {len(done)} of {len(nodes)} stages done"]
    for number, node in enumerate(nodes):
        missing = [need for need in node.needs if need not in done]
        if node.name in done:
            state = "done"
        elif folder.stage(number, node.name).path.exists():
            state = "begun"
        else:
            state = f"waits for {', '.join(missing)}" if missing else "next"
        lines.append(f"  {number:02d}-{node.name:<{width}}  {state}")
    return "\n".join(lines)


def _model_name(node: Node) -> str:
    """What a trained model is called in the evaluation: its arm, and whether RLVR came after."""
    return node.name if node.kind == "rlvr" else node.arm


class _Job:
    """Runs stages of the graph and knows where the outcome of each lies."""

    def __init__(self, context: Context, part: Part | None = None) -> None:
        self.context, self.config, self.part = context, context.config, part
        self.nodes = {node.name: node for node in graph(context.config)}
        self.folders = {name: context.folder.stage(n, name) for n, name in enumerate(self.nodes)}
        self._opened: dict[Path, PreparedCorpus] = {}

    def run(self, node: Node) -> None:
        """One stage, when it is not done. Raises UserError when what it needs is not there yet."""
        missing = [need for need in node.needs if not self.folders[need].done]
        missing = self.context.on_main("what is done", lambda: missing)
        if missing:
            raise UserError(
                f"stage {node.name} needs {', '.join(missing)}, not done in {self.config.run.dir}; run that first, "
                "or leave --stage out to run everything in order"
            )
        getattr(self, "_" + node.kind.replace("-", "_"))(node, self.folders[node.name])

    # ---------------------------------------------------------------- what stages leave

    def _result(self, name: str) -> dict[str, Any]:
        return self.context.on_main(f"result of {name}", self.folders[name].result)

    def _checkpoint(self, name: str) -> Path:
        """Checkpoint that a stage left: weights for another."""
        if name == "import":
            return self.folders[name].path / "checkpoint"
        return self.context.folder.path / self._result(name)["checkpoint"]

    def _start(self) -> Path | None:
        """Weights that every arm begins with; none = random ones."""
        name = next((name for name in ("base", "import") if name in self.nodes), None)
        if name is None and self.config.rlvr.start is not None:
            return start_checkpoint(self.config)
        return self._checkpoint(name) if name else None

    def _weights(self, arm: str, round: int) -> Path:
        """Weights that a thinking arm begins a round with."""
        weights = self._start() if round == 1 else self._checkpoint(f"{arm}-sft-{round - 1}")
        assert weights is not None, "validation lets no arm think without a base model"
        return weights

    def _policy(self, node: Node) -> Path:
        """Weights of q in the round of `node`: after the E-step, or those the round began with."""
        name = f"{node.arm}-variational-{node.round}"
        return self._checkpoint(name) if name in self.nodes else self._weights(node.arm, node.round)

    def _corpus(self, stage: str = "prepare") -> PreparedCorpus:
        """Raises UserError when its ids have no row in the model: it may have been prepared for another one."""
        path = self.folders[stage].path / "data" / "corpus"
        if path not in self._opened:
            opened = open_prepared(path)
            opened.tokenizer.check_fits(self.context.architecture.vocab_size)
            self._opened[path] = opened
        return self._opened[path]

    @property
    def _hf_folder(self) -> Path:
        """config.json and tokenizer: of the corpus, or where there is none of the model that is started from."""
        if "prepare" in self.nodes:
            return self.folders["prepare"].path / "hf"
        start = self._start()
        assert start is not None, "validation lets no run be without a corpus and a model"
        return start / "hf"

    # ---------------------------------------------------------------- stages, by kind

    def _import(self, node: Node, stage: StageFolder) -> None:
        self.context.run_once(stage, "import", lambda s: import_model(self.context, s))

    def _prepare(self, node: Node, stage: StageFolder) -> None:
        prepare_corpus(self.context, stage, self.folders.get("import"))

    def _prepare_base(self, node: Node, stage: StageFolder) -> None:
        prepare_base(self.context, stage, self.folders["prepare"])

    def _base(self, node: Node, stage: StageFolder) -> None:
        train = replace(self.config.train, tokens=self.config.base.tokens, steps=None, epochs=None)
        context = replace(self.context, config=replace(self.config, train=train))
        corpus = self._corpus("prepare-base")
        run_sft(context, stage, SftInputs(corpus, self._hf_folder, None, corpus))

    def _ntp(self, node: Node, stage: StageFolder) -> None:
        run_sft(self.context, stage, SftInputs(self._corpus(), self._hf_folder, self._start(), self._corpus()))

    def _variational(self, node: Node, stage: StageFolder) -> None:
        weights = self._weights(node.arm, node.round)
        whole = node.arm == "brite"
        inputs = VariationalInputs(self._corpus(), self._hf_folder, weights, node.round, whole_block=whole)
        run_variational(self.context, stage, inputs)

    def _generate(self, node: Node, stage: StageFolder) -> None:
        bolt = node.arm == "bolt"
        samples = self.config.generate.bolt_samples if bolt else 1
        inputs = GenerateInputs(
            self._corpus(), self._policy(node), node.round, samples=samples, resample=bolt, part=self.part
        )
        run_generate(self.context, stage, inputs)

    def _sft(self, node: Node, stage: StageFolder) -> None:
        infused = open_bootstrapped(self.folders[f"{node.arm}-generate-{node.round}"].path)
        weights = self._weights(node.arm, node.round) if self.config.train.init == "base" else self._policy(node)
        run_sft(self.context, stage, SftInputs(infused, self._hf_folder, weights, self._corpus()))

    def _tasks(self, node: Node, stage: StageFolder) -> None:
        self.context.run_once(stage, "tasks", lambda s: prepare_tasks(self.context, s, self._reader()))

    def _reader(self) -> TaskReader:
        reader = TaskReader(self.config, self._hf_folder.parent)
        reader.asker.tokenizer.check_fits(self.context.architecture.vocab_size)
        return reader

    def _rlvr(self, node: Node, stage: StageFolder) -> None:
        tasks = open_tasks(self._reader(), self.folders["tasks"].path)
        weights = self._checkpoint(node.needs[-1]) if node.arm else self._start()
        run_rlvr(self.context, stage, RlvrInputs(tasks, self._hf_folder, weights))

    def _export(self, node: Node, stage: StageFolder) -> None:
        checkpoint = self._checkpoint(node.needs[-1])
        self.context.run_once(stage, "export", lambda s: export_model(self.context, s, checkpoint))

    def _measure(self, node: Node, stage: StageFolder) -> None:
        arms = {arm: self._outcome(arm) for arm in self.config.run.arms}
        run_measure(self.context, stage, MeasureInputs(self._corpus(), arms, self._start()))

    def _evaluate(self, node: Node, stage: StageFolder) -> None:
        start = self._start()
        models = {} if start is None else {"base": start}
        for name in node.needs:
            need = self.nodes[name]
            if need.kind in ("sft", "ntp", "rlvr"):
                models[_model_name(need)] = self._checkpoint(name)
        run_evaluate(self.context, stage, EvaluateInputs(models))

    def _outcome(self, arm: str) -> ArmOutcome:
        """Final weights of an arm and what they cost: all its stages together."""
        stages = [node.name for node in self.nodes.values() if node.arm == arm and node.kind != "rlvr"]
        results = [self._result(name) for name in stages]
        return ArmOutcome(
            weights=self._checkpoint(stages[-1]),
            flops=sum(r.get("flops", 0.0) for r in results),
            raw_tokens=sum(r.get("code_tokens", 0) for r in results),
            seconds=sum(r.get("seconds", 0.0) for r in results),
            thinks=arm != "ntp",
        )

    # ---------------------------------------------------------------- the end

    def say_results(self, report: Path) -> None:
        """Tell where everything is, one line each."""
        path, lines = self.context.folder.path, ["", "done:"]
        for name, stage in self.folders.items():
            if not stage.done or self.nodes[name].kind not in ("base", "ntp", "sft", "variational", "rlvr"):
                continue
            result = self._result(name)
            text = f"  {name:<18} {result['step']} steps"
            if "validation_loss" in result:
                before, after = result["validation_loss_before"], result["validation_loss"]
                text += f", validation loss {before:.4f} -> {after:.4f} nats per token"
            if "probe_reward_after" in result:
                before, after = result["probe_reward_before"], result["probe_reward_after"]
                text += f", reward {before:.4f} -> {after:.4f} (rise +- {result['probe_rise_error']:.4f})"
            if result.get("pass_rate_after") is not None:
                before, after = result["pass_rate_before"], result["pass_rate_after"]
                text += f", held-out tasks passed {before:.1%} -> {after:.1%}"
            lines += [text, f"  {'':<18} {path / result['checkpoint']}"]
        if (export := self.folders.get("export")) is not None and export.done:
            lines.append(f"  Hugging Face       {export.path / 'hf'}")
        lines.append(f"  report             {report}")
        self.context.say("\n".join(lines))
