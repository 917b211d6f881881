"""Run by two processes in test_sharding.py: both stages on sharded models against the same on whole ones."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny import boosted, fitted, layer_plans, tiny_model
from torch.distributed.tensor import DTensor

from layerboost.healing.distillers import AttentionDistiller, Checkpointing, Distiller, LogitDistiller
from layerboost.healing.sharding import Shards, is_sharded, shard, to_full_tensor
from layerboost.healing.student import adapted_layers, shared_student, train_only, with_adapters

IDS = torch.randint(3, 200, (6, 40), generator=torch.Generator().manual_seed(0))
LETTERS = "fSnsnSf"
CASES: list[tuple[str, torch.dtype, Checkpointing, bool]] = [
    ("llama", torch.float32, "none", False),
    ("qwen3", torch.float32, "selective", True),
    ("gemma2", torch.float32, "full", True),
    ("phi3", torch.bfloat16, "selective", False),
    ("qwen3_moe", torch.float32, "full", False),
]


class Case:
    """Both stages' distillers over one pair of models whose adapters already do something."""

    def __init__(self, model_type: str, dtype: torch.dtype, checkpointing: Checkpointing, tied: bool, at: Path) -> None:
        letters = fitted(LETTERS, model_type)
        plans = layer_plans(letters)
        boosted(letters, model_type, tie_word_embeddings=tied).to(dtype).save_pretrained(at)  # the first process writes
        torch.distributed.barrier()
        self.teacher = tiny_model(model_type, len(letters), tie_word_embeddings=tied).to(dtype)
        adapted = adapted_layers(self.teacher, plans, None)
        self.student = shared_student(self.teacher, at, plans)
        torch.manual_seed(1)
        with_adapters(self.student, frozenset[str]().union(*adapted.values()), rank=4)
        for name, parameter in self.student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        models = self.student, self.teacher, plans
        self.distillers: dict[str, Distiller] = {
            "attention": AttentionDistiller(*models, 1),
            "lora": LogitDistiller(*models, 1, ce_weight=0.5, checkpointing=checkpointing),
        }
        self.adapted = adapted

    def gradients(self, stage: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of ids `[B, T]` and the whole gradient of each parameter that the stage trains."""
        train_only(self.student, stage, self.adapted[stage])
        self.student.zero_grad()
        loss = self.distillers[stage](ids)
        loss.backward()
        trained = self.distillers[stage].trained
        gradients = {name: to_full_tensor(parameter.grad).clone() for name, parameter in trained.items()}
        return {"loss": loss.detach(), **gradients}

    def parameters(self) -> set[torch.nn.Parameter]:
        return {*self.teacher.parameters(), *self.student.parameters()}


def watched(root: Shards) -> list[int]:
    """Grows with every module's backward pass: the number of layers that are whole at that moment."""
    groups = [group for group in root.held if isinstance(group, Shards)]
    counts: list[int] = []

    def see(*_: object) -> None:
        counts.append(sum(not is_sharded(group) for group in groups))

    for group in groups:
        for name, module in group.named_modules():
            if "lora_B" in name and not list(module.children()):
                module.register_full_backward_hook(see)
    return counts


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for model_type, dtype, checkpointing, tied in CASES:
        case = Case(model_type, dtype, checkpointing, tied, folder / model_type)
        expected = {stage: case.gradients(stage, IDS) for stage in case.distillers}
        elements = sum(parameter.numel() for parameter in case.parameters())
        root = shard(case.teacher, case.student, torch.device("cpu"))
        for distiller in case.distillers.values():
            root.gather_for(distiller, "forward")
        parts = [parameter for parameter in case.parameters() if isinstance(parameter, DTensor)]
        assert len(parts) == len(case.parameters())
        held = sum(part.to_local().numel() for part in parts)
        assert abs(held - elements / processes) < 0.05 * elements, (held, elements)
        counts = watched(root)
        for stage, wanted in expected.items():
            found = case.gradients(stage, IDS.chunk(processes)[rank])
            torch.distributed.all_reduce(found["loss"])
            found["loss"] /= processes
            assert found.keys() == wanted.keys()
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            for name, value in wanted.items():
                error = (found[name] - value).norm() / value.norm()
                assert error < tolerance, (model_type, stage, name, float(error))
            assert counts
            assert max(counts) <= 2, (model_type, stage, counts)
            counts.clear()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
