"""Training from a config to its last checkpoint."""

from __future__ import annotations

import fcntl
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from megakrause.batch import TokenBatch
from megakrause.checkpoint.files import write_bytes
from megakrause.checkpoint.model import check_shapes, stored_config
from megakrause.checkpoint.read import Checkpoint, find_checkpoint, newest_checkpoint
from megakrause.checkpoint.write import remove_leftovers, save_checkpoint
from megakrause.config import RunConfig
from megakrause.data.loader import eval_batches, num_eval_batches, train_batches
from megakrause.data.mixed import describe_past
from megakrause.data.open import Batches, eval_windows, train_samples
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError
from megakrause.models.build import build_model, flops_per_token, whole_shapes
from megakrause.models.layout import Layout
from megakrause.parallel.mesh import Mesh
from megakrause.training.engine import Engine
from megakrause.training.evaluate import Evaluation, evaluate
from megakrause.training.metrics import MetricsLog, memory_gib, peak_flops
from megakrause.training.schedule import learning_rate
from megakrause.training.watch import Watch

ORDER_KEYS = ("mask_documents", "packing", "shuffle_blocks")  # of data: with them the samples change


def train(config: RunConfig, mesh: Mesh) -> None:
    """Trains, or goes on from the newest checkpoint of config.output. Raises UserError on every rank."""
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
        self.tokenizer = mesh.world.together(lambda: Tokenizer.load(config.data.tokenizer))
        self.config = resolve(config, self.tokenizer.vocab_size)
        config = self.config
        checkpoint = self._find_checkpoint()
        self.batches = Batches(config.train.global_batch)
        if checkpoint is not None:
            before = checkpoint.step, checkpoint.state["position"], checkpoint.state["batches"]
            self.batches = Batches(config.train.global_batch, *before)
        self.samples = mesh.world.together(lambda: train_samples(config, self.tokenizer, self.batches))
        self.valid_windows = mesh.world.together(lambda: eval_windows(config, self.tokenizer))
        self._check_same_data()
        if checkpoint is not None:
            self._check_same_run(checkpoint)
        self.parameters = sum(map(math.prod, whole_shapes(config.model).values()))
        start = None
        if config.train.init_from is not None:
            start = find_checkpoint(config.train.init_from, mesh.world)
            check_shapes(start, config.model)
        # 2. The output folder, which is this run's alone from now on.
        self.lock = mesh.world.together(lambda: self._prepare_output() if mesh.is_main else None)
        # 3. The engine.
        model = build_model(config.model, config.train.seed, Layout.of(config, mesh))
        self.engine = Engine(model, config, mesh)
        # 4. Where to start from.
        self.step, self.position, self.tokens = 0, 0, 0
        if checkpoint is not None:
            self._resume(checkpoint)
        elif start is not None:
            self.engine.load(start, weights_only=True)

    def run(self) -> None:
        config, mesh = self.config, self.mesh
        steps = config.train.steps
        if self.step >= steps:
            self._say(f"{self.output} is already at step {self.step} of {steps}; raise train.steps to go on")
            return
        for line in self.samples.describe(self.position, (steps - self.step) * config.train.global_batch):
            self._say(line)
        self._say(
            f"training {self.parameters / 1e6:.2f} M parameters on {mesh.world.size} x {mesh.device.type}, "
            f"{config.train.global_batch} x {config.train.seq_len} tokens a step, steps {self.step + 1} to {steps}"
        )
        if mesh.is_main:
            write_bytes(self.output, "config.toml.tmp", iter([config.to_toml().encode()]))
            os.replace(self.output / "config.toml.tmp", self.output / "config.toml")
        log = MetricsLog(self.output, self.step, config.log.tensorboard) if mesh.is_main else None
        batches = train_batches(
            self.samples,
            global_batch=config.train.global_batch,
            rank=mesh.dp.rank,
            ranks=mesh.dp.size,
            start=self.position,
            prefetch=config.data.prefetch,
        )
        bar = tqdm(
            total=steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not mesh.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a file keeps every line
        )
        watch = Watch(mesh.world, config.parallel.timeout, self.step + 1)
        try:
            while self.step < steps:
                watch.progress(self.step + 1)
                began = time.perf_counter()
                batch, self.position = next(batches)
                waited = time.perf_counter() - began
                lr = learning_rate(config.optim, self.step, steps)
                result = self.engine.train_step(batch, lr)
                self.step += 1
                self.tokens += result.tokens
                row: dict[str, Any] = {"step": self.step, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
                seconds = time.perf_counter() - began
                row |= {"tokens": self.tokens, "tokens_per_s": result.tokens / seconds, "seconds": seconds}
                row |= {"data_seconds": waited}
                if not result.applied:
                    row["skipped"] = True
                    self._say(f"step {self.step}: skipped, a gradient is not finite (loss {result.loss})")
                bar.update()
                bar.set_postfix(loss=f"{result.loss:.3f}", tok_s=f"{row['tokens_per_s']:,.0f}", refresh=False)
                if log is not None:
                    self._log(log, row)
                self._evaluate_and_save(log, watch)
        except RuntimeError as error:
            if mesh.world.size == 1 or not lost_connection(error):
                raise
            watch.blame()
            raise SystemExit(1) from error
        except KeyboardInterrupt:
            self._say(f"interrupted at step {self.step}; the same command goes on from the last checkpoint")
            raise
        finally:
            watch.close()
            bar.close()
            batches.close()
            self.samples.close()
            if log is not None:
                log.close()

    def close(self) -> None:
        """Lets another run have the output folder."""
        if self.lock is not None:
            self.lock.close()

    def _evaluate_and_save(self, log: MetricsLog | None, watch: Watch) -> None:
        """What the end of this step is due to bring."""
        config, last = self.config, self.step == self.config.train.steps
        if self.valid_windows is not None and (last or _due(self.step, config.train.eval_every)):
            evaluation = self.evaluate(watch)
            watch.progress(self.step)
            if log is not None:
                row = evaluation.to_row()
                log.row({"step": self.step} | row)
                log.scalars(self.step, {name.replace("eval_", "eval/", 1): value for name, value in row.items()})
                tqdm.write(f"step {self.step}: held-out {evaluation}")
        if last or _due(self.step, config.checkpoint.every):
            self.save()

    def evaluate(self, watch: Watch) -> Evaluation:
        """The loss on data.valid."""
        windows, mesh, train = self.valid_windows, self.mesh, self.config.train
        assert windows is not None
        share = {"batch": self.engine.micro_batch, "ranks": mesh.dp.size, "limit": train.eval_sequences}
        batches, total = eval_batches(windows, rank=mesh.dp.rank, **share), num_eval_batches(windows, **share)

        def loss_sum(batch: TokenBatch) -> tuple[float, int]:
            watch.progress(self.step)
            return self.engine.evaluate_step(batch)

        return evaluate(loss_sum, batches, mesh, windows.corpus.bytes_per_token, total)

    def save(self) -> None:
        """Writes OUTPUT/checkpoints/step-N."""
        rng = {"cpu": torch.get_rng_state()}
        if self.mesh.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.mesh.device)
        save_checkpoint(
            self.output / "checkpoints",
            self.step,
            axis=self.mesh.world,
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
                "batches": self.batches.changes,
                "tokenizer": self.tokenizer.fingerprint,
            },
            files={"config.toml": self.config.to_toml().encode(), **self.tokenizer.files},
            keep=self.config.checkpoint.keep,
        )

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from. None: from the beginning."""
        root = self.output / "checkpoints"
        if not self.config.checkpoint.resume:
            files = [path.name for path in self.output.iterdir()] if self.output.exists() else []
            busy = self.mesh.world.gather_objects(set(files) - {".lock"})[0]
            if busy:
                raise UserError(f"checkpoint.resume = false needs an empty output, {self.output} is not; name another")
            return None
        checkpoint, passed_over = newest_checkpoint(root, self.mesh.world)
        for reason in passed_over:
            self._say(f"passed over {reason}")
        if checkpoint is None and (self.output / "metrics.jsonl").exists():
            self._say(f"{self.output} has no checkpoint yet: starting again from step 0")
        return checkpoint

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """Raises UserError when the checkpoint is of another model or another order of the data."""
        saved, now = stored_config(checkpoint), self.config
        state, folder = checkpoint.state, checkpoint.folder
        for key, before, after in [
            *((f"model.{k}", v, getattr(now.model, k)) for k, v in saved.model),
            ("train.seq_len", saved.train.seq_len, now.train.seq_len),
            ("train.seed", saved.train.seed, now.train.seed),
            *((f"data.{k}", getattr(saved.data, k), getattr(now.data, k)) for k in ORDER_KEYS),
            ("the tokenizer's hash", state["tokenizer"], self.tokenizer.fingerprint),
        ]:
            if before != after:
                raise UserError(
                    f"{folder} was trained with {key} = {before}, now it is {after}; "
                    "restore it, or choose another output (and train.init_from to start from these weights)"
                )

        names = state["sources"] | self.samples.names
        mixes = state["train_data"], self.samples.past(state["position"])
        if mixes[0] != mixes[1]:
            before, after = (describe_past(mix, names) for mix in mixes)
            raise UserError(
                f"{folder} was trained on {before}, now data.train says {after} for that; what comes may change, what "
                "was must not: restore it, or choose another output"
            )

    def _check_same_data(self) -> None:
        """Raises UserError on every rank when they read different data."""
        mine = {name: fingerprint for fingerprint, name in self.samples.names.items()}
        if self.valid_windows is not None:
            mine |= {f"{self.config.data.valid} (held out)": self.valid_windows.fingerprint}
        for rank, theirs in enumerate(every := self.mesh.world.gather_objects(mine)):
            for name, fingerprint in theirs.items():
                if fingerprint != every[0].get(name):
                    raise UserError(
                        f"{name} is not the same on rank {rank} as on rank 0; copy it again", everywhere=True
                    )

    def _prepare_output(self) -> TextIO:
        """Makes the folder and takes it for this run. Raises UserError when another has it."""
        self.output.mkdir(parents=True, exist_ok=True)
        lock = open(self.output / ".lock", "w")  # noqa: SIM115  held until the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing to {self.output}; wait for it, or choose another output"
            ) from error
        remove_leftovers(self.output / "checkpoints")
        return lock

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.engine.load(checkpoint)
        self.step, self.position = checkpoint.step, checkpoint.state["position"]
        self.tokens = checkpoint.state["tokens"]
        self.samples.resume(checkpoint.state["streams"])
        rng = checkpoint.rng(self.mesh.world.rank) if checkpoint.state["ranks"] == self.mesh.world.size else {}
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.mesh.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.mesh.device)
        self._say(f"resuming from {checkpoint.folder}")

    def _log(self, log: MetricsLog, row: dict[str, Any]) -> None:
        log.row(row)
        if self.step % self.config.log.every and self.step != self.config.train.steps:
            return
        flops = row["tokens_per_s"] * flops_per_token(self.config.model, self.config.train.seq_len)
        values = {f"train/{key}": row[key] for key in ("loss", "lr", "grad_norm", "tokens_per_s", "data_seconds")}
        values |= {"train/model_flops_per_s": flops, "train/memory_gib": memory_gib(self.mesh.device)}
        peak = peak_flops(self.mesh.device)
        if peak is not None and self.config.train.precision == "bf16":
            values["train/mfu"] = flops / (peak * self.mesh.world.size)
        values |= {f"sigma/{name}": value for name, value in self.engine.sigmas().items()}
        log.scalars(self.step, values)

    def _say(self, message: str) -> None:
        if self.mesh.is_main:
            tqdm.write(message)


def lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is not there."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def check_alike(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError on every rank when their configs differ."""
    for rank, other in enumerate(configs := mesh.world.gather_objects(config.flat())):
        for key, value in other.items():
            if value != configs[0][key]:
                raise UserError(
                    f"{key} = {value} on rank {rank} and {configs[0][key]} on rank 0; start all with the same config",
                    everywhere=True,
                )


def resolve(config: RunConfig, vocab_size: int) -> RunConfig:
    """The config with the model's vocabulary filled in. Raises UserError when it is less than the tokenizer's."""
    if config.model.vocab_size is None:
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
    if config.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is less than the tokenizer's; "
            f"leave it out or use {vocab_size}"
        )
    return config


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
