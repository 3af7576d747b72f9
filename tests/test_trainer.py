"""Hugging Face's Trainer around a cut model, in two gloo processes: losses and weights are those of a plain loop uncut.

accelerate takes a ParallelismConfig on GPUs only, by one check; `on_cpus` leaves that check out, and nothing else.
"""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tpfuse

from .ranks import run_processes
from .small_sizes import WORLD

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]
STEPS, RATE, LENGTH, VOCAB = 3, 1e-2, 8, 64


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, bos_token_id=1,
    ))  # fmt: skip


def by_its_own_plan(folder: str) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=init_device_mesh("cpu", (WORLD,)))


def by_parallelize(folder: str) -> nn.Module:
    from transformers.distributed import DistributedConfig

    model = tpfuse.parallelize(llama(), init_device_mesh("cpu", (WORLD,)), tpfuse.SharingPolicy(WORLD))
    model.config.distributed_config = DistributedConfig(tp_size=WORLD)  # what accelerate asks for
    return model


def on_cpus(rank: int, port: int) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None


def trained(rank: int, how: str, folder: str, port: int) -> tuple[list[float], list[float], float, int]:
    """The losses, those of a plain loop over the same batches, by how much the weights differ, and how many sums of the
    forward pass were fused."""
    on_cpus(rank, port)
    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    seen: list[Tensor] = []

    def collate(samples: list[Tensor]) -> dict[str, Tensor]:
        seen.append(torch.stack(samples))
        return {"input_ids": seen[-1], "labels": seen[-1]}

    model = {"its own plan": by_its_own_plan, "parallelize": by_parallelize}[how](folder)
    model.compile(backend="tpfuse", options={"inner": "aot_eager"})
    arguments = TrainingArguments(
        folder, max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant", per_device_train_batch_size=2,
        parallelism_config=ParallelismConfig(tp_size=WORLD), use_cpu=True, ddp_backend="gloo", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = list(torch.randint(2, VOCAB, (4 * STEPS, LENGTH), generator=torch.Generator().manual_seed(1)))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    expected, whole = plain_loop(seen[:STEPS])
    weights = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    assert set(weights) == set(whole)
    furthest = max(float((weights[name] - tensor).abs().max()) for name, tensor in whole.items())
    return losses, expected, furthest, sum(report.fused_forward for report in tpfuse.reports())


def plain_loop(batches: list[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    model, losses = llama(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Trainer's default
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, model.state_dict()


@pytest.mark.parametrize("how", ["its own plan", "parallelize"])
def test_trainer_with_a_cut_model_is_a_plain_loop_without(how, tmp_path):
    llama().save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for losses, expected, furthest, fused in run_processes(WORLD, trained, how, str(tmp_path), port):
        assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == STEPS
        assert furthest < RATE / 100 and fused == 5  # a step moves a weight by RATE
