"""Training from a config to its last checkpoint."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megakrause.batch import Batch
from megakrause.checkpoint.files import make_folder, write_bytes
from megakrause.checkpoint.model import StartingWeights, check_same_model
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import Checkpoint, newest_checkpoint
from megakrause.checkpoint.saver import Saver
from megakrause.checkpoint.write import Retention, Snapshot
from megakrause.config import RunConfig
from megakrause.data.images import ImageSamples
from megakrause.data.loader import eval_batches, num_eval_batches, train_batches
from megakrause.data.mixed import MixedWindows
from megakrause.data.open import Batches, eval_images, eval_windows, train_images, train_samples
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import Stopped, UserError
from megakrause.hf.weights import find_model, find_weights
from megakrause.models.build import build_model, trained_shapes, whole_shapes
from megakrause.models.flops import flops_per_unit
from megakrause.models.layout import Layout
from megakrause.parallel.mesh import Mesh
from megakrause.training.checks import check_alike, check_nothing_saved, check_same_data, check_same_run, resolve
from megakrause.training.drawing import pictures
from megakrause.training.engine import Engine
from megakrause.training.evaluate import Evaluation, evaluate
from megakrause.training.guard import Guard, Verdict
from megakrause.training.lock import NAME as LOCK
from megakrause.training.lock import OutputLock
from megakrause.training.metrics import MetricsLog, memory_gib, peak_flops
from megakrause.training.schedule import learning_rate
from megakrause.training.stop import StopRequest
from megakrause.training.watch import SLOWEST, Watch


def train(config: RunConfig, mesh: Mesh) -> None:
    """Trains, or goes on from the newest checkpoint of config.output. Raises UserError on every rank, and Stopped when
    the run was asked to end early."""
    trainer = Trainer(config, mesh)
    try:
        trainer.run()
    finally:
        trainer.close()


class Trainer:
    """The parts of one run, built in the order in which they need each other."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.mesh = mesh
        self.output = Path(config.output)
        # 1. Whatever can be refused is refused before anything is written.
        check_alike(config, mesh)
        mesh.world.together(lambda: config.accumulation(mesh.dp.size))
        self.tokenizer: Tokenizer | None = None  # of images there is none
        if config.model.kind == "lm":
            self.tokenizer = mesh.world.together(lambda: Tokenizer.load(config.tokenizer))
            config = resolve(config, self.tokenizer.vocab_size)
        self.config = config
        self.place = mesh.world.together(lambda: Place.of(config.checkpoint.folder or self.output / "checkpoints"))
        self.damaged: set[int] = set()  # steps whose checkpoints do not verify
        checkpoint = self._find_checkpoint()
        self.samples, self.batches = self._open_data(checkpoint)
        self.valid = mesh.world.together(self._open_valid)
        check_same_data(config, self.samples, self.valid, mesh)
        if checkpoint is not None:
            check_same_run(checkpoint, config, self.samples, self.tokenizer)
        self.parameters = sum(map(math.prod, whole_shapes(config.model).values()))
        self.trained = sum(map(math.prod, trained_shapes(config.model).values()))
        start = None
        if config.train.init_from is not None:
            check_same_model(config.train.init_from, find_model(config.train.init_from, mesh.world), config.model)
            start = StartingWeights(find_weights(config.train.init_from, mesh.world), config.model)
        # 2. The output folder, which is this run's alone from now on.
        self.locks = mesh.world.together(lambda: self._prepare_output(checkpoint) if mesh.is_main else [])
        # 3. The engine, and who writes its state.
        model = build_model(config.model, config.train.seed, Layout.of(config, mesh))
        self.engine = Engine(model, config, mesh)
        keep = Retention(config.checkpoint.keep, config.checkpoint.keep_every, self.damaged)
        beside = mesh.beside(timedelta(seconds=SLOWEST))
        self.saver = Saver(self.place, beside, keep, asynchronous=config.checkpoint.asynchronous)
        self.guard = Guard(config.guard)
        self.log: MetricsLog | None = None
        # 4. Where to start from.
        self.step, self.position, self.tokens, self.saved = 0, 0, 0, -1  # saved: the step of the last checkpoint
        if checkpoint is not None:
            self._resume(checkpoint)
        elif start is not None:
            self.engine.load_weights(start)

    def run(self) -> None:
        config, mesh = self.config, self.mesh
        steps = config.train.steps
        if self.step >= steps:
            self._say(f"{self.output} is already at step {self.step} of {steps}; raise train.steps to go on")
            return
        for line in self.samples.describe(self.position, (steps - self.step) * config.train.global_batch):
            self._say(line)
        what = f"{self.parameters / 1e6:.2f} M parameters"
        unit = config.model.unit
        each = f" {unit}s" if unit == "image" else f" x {config.seq_len} {unit}s"
        if self.trained < self.parameters:
            what = f"{self.trained / 1e6:.3f} M of {what} ({self.trained / self.parameters:.2%})"
        self._say(
            f"training {what} on {mesh.world.size} x {mesh.device.type}, "
            f"{config.train.global_batch}{each} a step, steps {self.step + 1} to {steps}"
        )
        if mesh.is_main:
            write_bytes(self.output, "config.toml.tmp", iter([config.to_toml().encode()]))
            os.replace(self.output / "config.toml.tmp", self.output / "config.toml")
        self.saver.reserve(self.engine.fragments())
        bar = tqdm(
            total=steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not mesh.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a file keeps every line
        )
        self._begin()
        stop = StopRequest(config.train.time_limit)
        watch = Watch(mesh.world, config.parallel.timeout, self.step + 1, self.output / "stacks")
        try:
            while self.step < steps:
                watch.progress(self.step + 1)
                verdict = self._train_step(bar)
                verdict, stopping = self._agree(verdict, stop)
                if stopping and self.step < steps:
                    bar.close()  # what is said last stands on lines of its own
                    self._stop(stop, verdict, watch)
                elif verdict is Verdict.GO_ON:
                    self._evaluate_and_save(watch)
                else:
                    self._roll_back(verdict, watch)
                    bar.n = self.step
            with watch.patient():
                self._check_saved(final=True)
            watch.finish()
        except UserError:
            watch.told()  # this process says why; the others need not say that it is gone
            raise
        except RuntimeError as error:
            if mesh.world.size == 1 or not lost_connection(error):
                raise
            watch.blame()
            raise SystemExit(1) from error
        finally:
            watch.close()
            stop.close()
            bar.close()
            self._end()

    def close(self) -> None:
        """Lets another run have the output folder."""
        for lock in self.locks:
            lock.close()
        if isinstance(self.valid, ImageSamples):
            self.valid.close()

    def _begin(self) -> None:
        """Opens what stands at a place of the run: the log, and the data read ahead."""
        config, mesh = self.config, self.mesh
        self.log = MetricsLog(self.output, self.step, config.log.tensorboard) if mesh.is_main else None
        self._incoming: Generator[tuple[Batch, int], None, None] = train_batches(
            self.samples,
            global_batch=config.train.global_batch,
            rank=mesh.dp.rank,
            ranks=mesh.dp.size,
            start=self.position,
            prefetch=config.data.prefetch,
        )

    def _end(self) -> None:
        self._incoming.close()
        self.samples.close()
        if self.log is not None:
            self.log.close()

    def _train_step(self, bar: tqdm) -> Verdict:
        """One step, and what it says of the run's health."""
        began = time.perf_counter()
        batch, self.position = next(self._incoming)
        waited = time.perf_counter() - began
        lr = learning_rate(self.config.optim, self.step, self.config.train.steps)
        result = self.engine.train_step(batch, lr)
        self.step += 1
        self.tokens += result.tokens
        verdict = self.guard.judge(result.loss, result.applied)
        row: dict[str, Any] = {"step": self.step, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
        seconds = time.perf_counter() - began
        unit = self.config.model.unit
        row |= {f"{unit}s": self.tokens, f"{unit}s_per_s": result.tokens / seconds, "seconds": seconds}
        row |= {"data_seconds": waited}
        if not result.applied:
            row |= {"skipped": True}
            in_a_row = f"{self.guard.skipped} in a row, {self.config.guard.skips} are too many"
            self._say(f"step {self.step}: skipped, a gradient is not finite (loss {result.loss}); {in_a_row}")
        bar.update()
        rate = {f"{unit[:3]}_s": f"{result.tokens / seconds:,.0f}"}
        bar.set_postfix(loss=f"{result.loss:.3f}", **rate, refresh=False)
        self._write_row(row)
        return verdict

    def _agree(self, verdict: Verdict, stop: StopRequest) -> tuple[Verdict, bool]:
        """What all ranks do after a step, whoever has a reason: (the gravest verdict, whether to stop)."""
        mine = [verdict, stop.reason is not None, self.saver.has_failed]
        worst, stopping, failed = self.mesh.world.max(torch.tensor(mine, device=self.mesh.device)).tolist()
        if failed:
            self._check_saved()
        return Verdict(worst), bool(stopping)

    def _stop(self, stop: StopRequest, verdict: Verdict, watch: Watch) -> None:
        """Saves, unless this step is one to go back from, and raises Stopped."""
        reasons = self.mesh.world.gather_objects(stop.reason)
        reason, steps = next(reason for reason in reasons if reason), self.config.train.steps
        with watch.patient():
            if verdict is Verdict.GO_ON:
                self._say(f"{reason}: saving at step {self.step}, then this run ends")
                self.save()
                done = f"saved at step {self.step} of {steps}; the same command goes on from there"
            else:
                done = f"step {self.step} is not saved, for {self.guard.reason}; the same command goes on before that"
            self._check_saved(final=True)
        watch.finish()
        stopped = Stopped(f"{reason}; {done}")
        stopped.say()
        self.mesh.world.gather_objects(None)  # the first rank that ends has its launcher end the others
        raise stopped

    def _roll_back(self, verdict: Verdict, watch: Watch) -> None:
        """Goes back to the last checkpoint. Raises UserError on every rank when that has not helped before."""
        with watch.patient():
            self._go_back(verdict)
        self._begin()

    def _go_back(self, verdict: Verdict) -> None:
        self._check_saved()
        checkpoint = self._newest_checkpoint()
        verdict = self.guard.allowed(verdict, None if checkpoint is None else checkpoint.step)
        if checkpoint is None or verdict is Verdict.STOP:
            why = "there is no checkpoint to go back to" if checkpoint is None else "going back has not helped"
            raise UserError(f"step {self.step}: {self.guard.reason}, and {why}", everywhere=True)
        self._say(f"step {self.step}: {self.guard.reason}")
        self._end()
        skip_to = self.position if verdict is Verdict.ROLL_BACK_AND_SKIP else None
        self.samples, self.batches = self._open_data(checkpoint, skip_to)
        self._resume(checkpoint)
        if skip_to is not None:
            self._say(f"the data of sequences {self.position} to {skip_to - 1} is left out")
            self.position = skip_to

    def _evaluate_and_save(self, watch: Watch) -> None:
        """What the end of this step is due to bring."""
        config, last = self.config, self.step == self.config.train.steps
        if self.valid is not None and (last or _due(self.step, config.train.eval_every)):
            evaluation = self.evaluate(watch)
            watch.progress(self.step)
            if self.log is not None:
                row = evaluation.to_row()
                self.log.row({"step": self.step} | row)
                self.log.scalars(self.step, {name.replace("eval_", "eval/", 1): value for name, value in row.items()})
                tqdm.write(f"step {self.step}: held-out {evaluation}")
            if config.log.samples and isinstance(self.valid, ImageSamples) and config.model.kind == "image":
                with watch.patient():
                    for name, picture in pictures(self.engine, self.valid, config):
                        if self.log is not None:
                            self.log.picture(self.step, name, picture)
        # A run that is in trouble may have to go back to before it was.
        if last or _due(self.step, config.checkpoint.every) and not self.guard.skipped:
            with watch.patient():
                self.save()

    def evaluate(self, watch: Watch) -> Evaluation:
        """The means over data.valid."""
        valid, mesh, train = self.valid, self.mesh, self.config.train
        assert valid is not None
        share = {"batch": self.engine.micro_batch, "ranks": mesh.dp.size, "limit": train.eval_sequences}
        ahead = 2 if isinstance(valid, ImageSamples) else 0  # decoded meanwhile
        batches = eval_batches(valid, rank=mesh.dp.rank, prefetch=ahead, **share)
        total = num_eval_batches(valid, **share)

        def sums(batch: Batch) -> tuple[list[float], int]:
            watch.progress(self.step)
            return self.engine.evaluate_step(batch)

        bytes_per_token = valid.corpus.bytes_per_token if isinstance(valid, TokenWindows) else None
        return evaluate(sums, batches, mesh, self.config.model, bytes_per_token, total)

    def save(self) -> None:
        """Writes the checkpoint of this step, or begins to."""
        self._check_saved()
        rng = {"cpu": torch.get_rng_state()}
        if self.mesh.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.mesh.device)
        snapshot = Snapshot(
            self.step,
            fragments=self.engine.fragments(),
            rng=rng,
            state={
                "optimizer_steps": self.engine.optimizer_steps,
                "position": self.position,
                "tokens": self.tokens,
                "ranks": self.mesh.world.size,
                "train_data": self.samples.past(self.position),
                "sources": self.samples.names,
                "streams": self.samples.stream_states(self.position),
                "batches": list(self.batches.changes),
                "guard": self.guard.state,
                "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "",
                **({"classes": self.samples.classes} if isinstance(self.samples, ImageSamples) else {}),
            },
            files={"config.toml": self.config.to_toml().encode()} | (self.tokenizer.files if self.tokenizer else {}),
        )
        stalled = self.saver.save(snapshot)
        self.saved = self.step
        if self.log is not None:
            self.log.scalars(self.step, {"checkpoint/stalled_seconds": stalled})
        if not self.config.checkpoint.asynchronous:
            self._check_saved()

    def _check_saved(self, final: bool = False) -> None:
        """Waits for the last checkpoint to be written. Raises UserError on every rank when that failed and the run is
        not to go on without; `final`: there is no later one."""
        failure = self.saver.wait()
        if failure is None:
            return
        if final or self.config.checkpoint.on_failure == "stop":
            raise UserError(f"step {self.saved} could not be saved: {failure}", everywhere=True)
        self._say(f"step {self.saved} could not be saved: {failure}; training goes on, as checkpoint.on_failure says")

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from. None: from the beginning."""
        if not self.config.checkpoint.resume:
            files = [path.name for path in self.output.iterdir()] if self.output.exists() else []
            busy = self.mesh.world.gather_objects(set(files) - {LOCK} or self.place.steps())[0]
            if busy:
                raise UserError(f"checkpoint.resume = false needs an empty output, {self.output} is not; name another")
            return None
        checkpoint = self._newest_checkpoint()
        if checkpoint is None and (self.output / "metrics.jsonl").exists():
            self.mesh.world.together(lambda: check_nothing_saved(self.output, self.config.checkpoint.folder))
            self._say(f"{self.output} has no checkpoint yet: starting again from step 0")
        return checkpoint

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The newest that verifies; says why newer ones do not."""
        checkpoint, passed_over = newest_checkpoint(self.place, self.mesh.world)
        self.damaged.update(passed_over)
        for step, problem in passed_over.items():
            self._say(f"passed over step-{step}: {problem}")
        return checkpoint

    def _open_valid(self) -> TokenWindows | ImageSamples | None:
        return eval_windows(self.config, self.tokenizer) if self.tokenizer else eval_images(self.config)

    def _open_samples(self, batches: Batches) -> MixedWindows | ImageSamples:
        return train_samples(self.config, self.tokenizer, batches) if self.tokenizer else train_images(self.config)

    def _open_data(
        self, checkpoint: Checkpoint | None, skip_to: int | None = None
    ) -> tuple[MixedWindows | ImageSamples, Batches]:
        """The samples from a checkpoint on, or from the beginning; of those before sample `skip_to`, none."""
        batches = Batches(self.config.train.global_batch)
        if checkpoint is not None:
            state = checkpoint.state
            batches = Batches(self.config.train.global_batch, checkpoint.step, state["position"], state["batches"])
            if skip_to is not None:
                batches.skip_to(checkpoint.step, skip_to)
        return self.mesh.world.together(lambda: self._open_samples(batches)), batches

    def _prepare_output(self, checkpoint: Checkpoint | None) -> list[OutputLock]:
        """Makes the folders and takes them for this run. Raises UserError when another has one, or has had it and saved
        since `checkpoint` was found to be the newest."""
        folders = [self.output]
        if "://" not in (path := self.place.path.removeprefix("file://")):
            place = Path(path)
            if self.config.checkpoint.folder is not None:
                folders.append(place)
            # Another run may use this one's folder of checkpoints, or this one that of another run's output.
            folders += [folder for folder in (place, place.parent) if (folder / LOCK).exists()]
        for folder in folders:
            make_folder(folder)
        with ExitStack() as locks:
            held = []
            for folder in dict.fromkeys(folder.resolve() for folder in folders):
                held.append(OutputLock(folder))
                locks.callback(held[-1].close)
            found = -1 if checkpoint is None else checkpoint.step
            if newer := [step for step in self.place.steps() if step > found and step not in self.damaged]:
                where = self.place.path
                raise UserError(f"another run has just saved step {newer[0]} in {where}; start again to go on")
            self.place.clean()
            locks.pop_all()
        return held

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.engine.load(checkpoint)
        state = checkpoint.state
        self.step, self.position, self.tokens = checkpoint.step, state["position"], state["tokens"]
        self.samples.resume(state["streams"])
        self.guard.go_back(state["guard"])
        rng = checkpoint.rng(self.mesh.world.rank) if state["ranks"] == self.mesh.world.size else {}
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.mesh.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.mesh.device)
        self._say(f"resuming from {checkpoint.path}")

    def _write_row(self, row: dict[str, Any]) -> None:
        if self.log is None:
            return
        self.log.row(row)
        if self.step % self.config.log.every and self.step != self.config.train.steps:
            return
        rate = f"{self.config.model.unit}s_per_s"
        flops = row[rate] * flops_per_unit(self.config.model, self.config.seq_len)
        values = {f"train/{key}": row[key] for key in ("loss", "lr", "grad_norm", rate, "data_seconds")}
        values |= {"train/model_flops_per_s": flops, "train/memory_gib": memory_gib(self.mesh.device)}
        peak = peak_flops(self.mesh.device)
        if peak is not None and self.config.train.precision == "bf16":
            values["train/mfu"] = flops / (peak * self.mesh.world.size)
        values |= {f"sigma/{name}": value for name, value in self.engine.sigmas().items()}
        self.log.scalars(self.step, values)

    def _say(self, message: str) -> None:
        if self.mesh.is_main:
            tqdm.write(message)


def lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is not there."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
