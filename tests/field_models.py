"""Models of other packages, small and with random weights, as people train them: nothing is downloaded.

Each :class:`FieldModel` makes a module, its batch, and the loss of its outputs. Sizes are those of a test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Any]

LENGTH, WORDS, IMAGE = 12, 60, 32


@dataclass(frozen=True)
class FieldModel:
    """A model of `package`: `make` gives its module, `batch` what the module is called with.

    Attributes:
        score: the loss, of the module's outputs and the batch.
        dtype: of the weights.
        plain: the same model, with parameters of the same names, as plain double backward differentiates it rightly in
            float64; None if `make`'s is one.
        eval_mode: whether dropout is off and BatchNorm uses its statistics.
        tolerance: of the relative difference from the same model in float64.
    """

    package: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    score: Callable[[Any, Batch], Tensor]
    plain: Callable[[], nn.Module] | None = None
    dtype: torch.dtype = torch.float32
    eval_mode: bool = False
    tolerance: float = 1e-3

    @property
    def installed(self) -> bool:
        """Whether the package can be had here."""
        return importlib.util.find_spec(self.package) is not None

    def built(
        self, dtype: torch.dtype | None = None, plain: bool = False
    ) -> tuple[nn.Module, dict[str, Tensor], Batch]:
        """The module, its trained weights by name, and the batch, floating tensors in `dtype`; the same every time."""
        dtype = self.dtype if dtype is None else dtype
        make = self.plain if plain and self.plain is not None else self.make
        torchvision_operators()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = make().to(dtype).train(not self.eval_mode)
            batch = {name: cast(value, dtype) for name, value in self.batch().items()}
        weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        return module, weights, batch


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def own_loss(outputs: Any, batch: Batch) -> Tensor:
    """As models of transformers return it when they are given labels."""
    return outputs.loss


def entropy(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[-1])


def padding(rows: int = 4) -> Tensor:
    """An attention mask of sequences of several lengths."""
    return (torch.arange(LENGTH) < torch.tensor([LENGTH, 9, 7, 5])[:rows, None]).long()


def text(mask: bool = True, causal: bool = True) -> Batch:
    """Words, and the words or a class as labels."""
    words = torch.randint(1, WORDS, (4, LENGTH))
    batch: Batch = {"input_ids": words}
    if mask:
        batch["attention_mask"] = padding()
        words = words.masked_fill(padding() == 0, -100)
    batch["labels"] = words if causal else torch.tensor([0, 1, 1, 0])
    return batch


def pictures(labels: bool = False) -> Batch:
    images = torch.randn(4, 3, IMAGE, IMAGE)
    return {"pixel_values": images, "labels": torch.tensor([0, 1, 1, 0])} if labels else {"x": images}


_BERT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": LENGTH,
}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "use_cache": False}


def bert(**changes: Any) -> nn.Module:
    import transformers

    return transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT, **changes))


def gpt2(**changes: Any) -> nn.Module:
    import transformers

    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **changes))


def llama(**changes: Any) -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, **changes))


def mixtral(**changes: Any) -> nn.Module:
    import transformers

    sizes = {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **changes))


def t5() -> nn.Module:
    import transformers

    sizes = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, use_cache=False)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    import transformers

    sizes = {k: v for k, v in _BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=IMAGE, patch_size=8))


def checkpointed() -> nn.Module:
    module = bert()
    module.gradient_checkpointing_enable({"use_reentrant": False})
    return module


def lora(module: nn.Module, targets: list[str], task: str) -> nn.Module:
    """With adapters in place of `targets`, whose second factor is not zero as it is at first."""
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=0.1, task_type=task)
    adapted = peft.get_peft_model(module, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    return adapted


def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=4, **settings)

    return make


_OPERATORS: list[torch.library.Library] = []


def torchvision_operators() -> None:
    """Let torchvision be imported, as timm and transformers do, where its compiled part does not fit this torch.

    torchvision registers shape functions of two operators that only its compiled part defines. None of the models here
    calls them; declaring them is enough.
    """
    if _OPERATORS or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)


class Graph(nn.Module):
    """Two layers of torch_geometric on a graph of ten nodes."""

    def __init__(self, kind: str):
        super().__init__()
        from torch_geometric import nn as layers

        settings = {"heads": 2, "concat": False} if kind == "GATConv" else {}
        layer = getattr(layers, kind)
        self.first, self.second = layer(6, 8, **settings), layer(8, 3, **settings)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        hidden = F.dropout(self.first(x, edge_index).relu(), 0.2, training=self.training)
        return self.second(hidden, edge_index)


def graph() -> Batch:
    return {"x": torch.randn(10, 6), "edge_index": torch.randint(10, (2, 30))}


def diffusion() -> nn.Module:
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def noise() -> Batch:
    return {"sample": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([3, 70])}


def denoising(outputs: Any, batch: Batch) -> Tensor:
    return (outputs.sample - batch["sample"]).square().mean()


def _text(make: Callable[[], nn.Module], mask: bool = True, causal: bool = True, **settings: Any) -> FieldModel:
    return FieldModel("transformers", make, lambda: text(mask, causal), own_loss, **settings)


def _timm(name: str, eval_mode: bool = False, **settings: Any) -> FieldModel:
    return FieldModel("timm", timm_model(name, **settings), pictures, entropy, eval_mode=eval_mode)


_SMALL_VIT = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

MODELS: dict[str, FieldModel] = {
    "BERT": _text(bert, causal=False),
    "BERT, no mask": _text(bert, mask=False, causal=False),
    "BERT, evaluation mode": _text(bert, causal=False, eval_mode=True),
    "BERT, eager attention": _text(lambda: bert(attn_implementation="eager"), causal=False),
    "BERT, gradient checkpointing": _text(checkpointed, causal=False, plain=bert),
    "BERT, bfloat16": _text(bert, causal=False, dtype=torch.bfloat16, eval_mode=True, tolerance=0.1),
    "GPT-2, tied weights": _text(gpt2),
    "GPT-2, no mask": _text(gpt2, mask=False),
    "Llama": _text(llama),
    "Llama, no mask": _text(llama, mask=False),
    "Mixtral": _text(mixtral, plain=lambda: mixtral(experts_implementation="eager")),
    "Mixtral, loop over experts": _text(lambda: mixtral(experts_implementation="eager")),
    "T5": _text(t5),
    "ViT": FieldModel("transformers", vit, lambda: pictures(labels=True), own_loss),
    "BERT with LoRA": FieldModel(
        "peft", lambda: lora(bert(), ["query", "value"], "SEQ_CLS"), lambda: text(causal=False), own_loss
    ),
    "Llama with LoRA": FieldModel("peft", lambda: lora(llama(), ["q_proj", "v_proj"], "CAUSAL_LM"), text, own_loss),
    "timm ViT": _timm("vit_tiny_patch16_224", **_SMALL_VIT),
    "timm ResNet": _timm("test_resnet", eval_mode=True),
    "timm MobileNetV3": _timm("mobilenetv3_small_050", eval_mode=True),
    "timm ConvNeXt": _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), drop_path_rate=0.1),
    "timm EfficientNet": _timm("test_efficientnet", eval_mode=True),
    "GCN": FieldModel("torch_geometric", lambda: Graph("GCNConv"), graph, entropy),
    "GAT": FieldModel("torch_geometric", lambda: Graph("GATConv"), graph, entropy),
    "diffusion U-Net": FieldModel("diffusers", diffusion, noise, denoising),
}
