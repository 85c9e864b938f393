"""Losses of a batch that is split over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hvp_engine._support.dtensor import Shard, is_sharded, local_part
from hvp_engine._support.flat_vector import state_dtype_of
from hvp_engine._support.pytree import check_scalar
from hvp_engine._support.torch_compat import pytree
from hvp_engine.differentiation.double_backward import differentiate
from hvp_engine.differentiation.problem import Averaged, GatheringLoss
from hvp_engine.distributed.collectives import Processes, Summands, note
from hvp_engine.distributed.sharding import ShardedList
from hvp_engine.errors import DistributedError


class DataParallel(GatheringLoss):
    """A loss of a batch that is split over processes: the mean of `loss` over the parts that they hold.

    L(w, lambda) = sum_r n_r L(w, lambda, batch_r) / sum_r n_r

    Pass it to :class:`Hypergradient`, :class:`Tuner`, :class:`HessianOperator` and the like in place of `loss`, in
    every process, with the batch of that process. Their losses, gradients, products, mixed products and spectra are
    then those of the whole batch; every process gets the same numbers and makes the same decisions. A term that does
    not depend on the batch, such as weight decay, counts once.

    Arguments:
        loss: `loss(weights, hyper, batch)` or `loss(weights, batch)` -> scalar tensor, a mean over the batch. Its
            module may be plain or wrapped in DistributedDataParallel (see :func:`functional`); the wrapper's own
            reduction is not used, since it does not reduce what `torch.autograd.grad` computes.
        group: the process group; None is the default one. gloo or NCCL.
        examples: a function of the batch that returns n_r, for example `lambda batch: len(batch[0])` if the parts
            differ in size; where it returns 0, the loss is not evaluated. None weights all processes equally.

    Called as a function it is the loss itself, with first derivatives: a training loop may call `.backward()` on it.

    Validity: weights and hyperparameters must be the same in every process, which is checked at first use; random
    draws may differ. The processes must compute alike (hardware, threads, versions), since each makes the solver's
    decisions itself, from the same numbers.

    Errors: what the loss raises in one process is raised in all: in that one as it is, in the others as an error that
    names the process (a :class:`DistributedError`, or the same class if it is one of this package).

    Cost: for each product one all-reduce of a vector of weights, in float32 (float64 for float64 weights); one
    for a loss together with its gradients; one for the mixed product. After each the host waits for the device, to
    see whether a process failed; within a solve for the message before, so that the device always has work. Memory:
    one flat vector of weights.

    Sharded weights: all weights may be DTensors, each cut along one dimension over the processes of `group`, as by
    `distribute_tensor(weight, mesh, [Shard(0)])`; each hyperparameter may be one too. `loss` receives whole tensors.
    Each process keeps its shards of the weights, of the solver's vectors and of the results, so that they take 1 / N
    of the memory. Each product gathers the tangent and scatters the product: as many bytes as an all-reduce, with
    tangent, product and message whole for that time. Solvers that need inner products send small messages besides.
    alpha="auto" and other estimates start from other random vectors than in one process.

    Limits: engines that run or compile whole terms run only the product, since the reduction comes between product
    and step; `SyncBatchNorm`, which communicates by itself, has no second derivative; `Exact`, `Nystrom` and
    `batched=True` need replicated weights.

    >>> import tempfile, torch, torch.distributed as dist, hvp_engine as hvp
    >>> file = tempfile.NamedTemporaryFile()                           # torchrun does this for many processes
    >>> dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
    >>> loss = hvp.DataParallel(lambda w, batch: (batch * w**2).mean())
    >>> H = hvp.HessianOperator(loss, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    >>> H @ torch.ones(2)
    tensor([3., 4.])
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        group: dist.ProcessGroup | None = None,
        *,
        examples: Callable[[Any], float] | None = None,
    ):
        if not callable(loss):
            raise TypeError(f"loss: expected a function of (weights, ..., batch); got {type(loss).__name__}")
        if isinstance(loss, DataParallel):
            raise TypeError("loss: expected the loss of one process; got a DataParallel: wrap it once")
        self.loss, self.examples = loss, examples
        self.processes = Processes(group)
        self._compared = False

    def __call__(self, *arguments: Any) -> Tensor:
        leaves, spec = pytree.tree_flatten(arguments)
        tensors = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        point = [leaf for leaf in pytree.tree_leaves(arguments[:-1] or arguments) if isinstance(leaf, Tensor)]
        self.compare([leaf for leaf in point if not is_sharded(leaf)])
        known = torch.is_grad_enabled()
        shards = {index: Shard.of(leaf, "weights, hyper") for index, leaf in tensors.items() if is_sharded(leaf)}
        varying = {index: leaf for index, leaf in tensors.items() if index in shards or (known and leaf.requires_grad)}
        held = [local_part(leaf) if index in shards else leaf for index, leaf in varying.items()]

        def evaluate(whole: Sequence[Tensor]) -> tuple[Tensor, float]:
            given = list(leaves)
            for index, tensor in zip(varying, whole, strict=True):
                given[index] = tensor
            return self._part(pytree.tree_unflatten(given, spec))

        device = next((leaf.device for leaf in tensors.values()), torch.device("cpu"))
        holding = ShardedList(self.processes, held, [shards.get(index) for index in varying], device)
        dtype = state_dtype_of([leaf.dtype for leaf in point])
        return _MeanLoss.apply(holding, evaluate, known, *held).to(dtype)

    def share(self, batch: Any) -> float:
        """n_r, the weight of this process in the mean."""
        if self.examples is None:
            return 1.0
        number = float(self.examples(batch))
        if not 0 <= number < float("inf"):
            raise ValueError(f"examples: expected a finite number >= 0; got {number}")
        return number

    def compare(self, tensors: Sequence[Tensor]) -> None:
        """Raise, at the first call, unless every process holds the same values."""
        if self._compared:
            return
        self._compared = True
        other = self.processes.same(tensors)
        if other is not None:
            raise DistributedError(
                f"weights, hyper: expected the same values in every process; got others in process {other} than in "
                "process 0: begin with the same seed, or broadcast them with torch.distributed.broadcast"
            )

    def averaged(self) -> DataParallel:
        """The mean over a list of batches in every process; see :class:`Averaged`."""
        examples = self.examples
        total = None if examples is None else lambda batches: sum(examples(batch) for batch in batches)
        return DataParallel(Averaged(self.loss), self.processes.group, examples=total)

    def _part(self, arguments: Sequence[Any]) -> tuple[Tensor, float]:
        """This process's loss, and its weight in the mean."""
        share = self.share(arguments[-1])
        if share == 0:
            return torch.zeros(()), share
        loss = self.loss(*arguments)
        check_scalar(loss, "loss")
        return loss, share


class _MeanLoss(torch.autograd.Function):
    """The mean loss over all processes. One sum brings the loss and its gradients, which are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        held: ShardedList,
        evaluate: Callable[[Sequence[Tensor]], tuple[Tensor, float]],
        differentiated: bool,
        *tensors: Tensor,
    ) -> Tensor:
        inputs = [
            whole.requires_grad_(differentiated and tensor.requires_grad)
            for whole, tensor in zip(held.gathered(tensors), tensors, strict=True)
        ]

        def compute(figures: Tensor) -> Summands:
            with torch.set_grad_enabled(differentiated):
                loss, share = evaluate(inputs)
            figures[0], figures[1] = share * loss.detach().reshape(()), share
            found = differentiate(loss, inputs, retain_graph=False) if loss.requires_grad else [None] * len(inputs)
            note(figures[2:], found)
            return found, share

        sums, figures = held.sum(2 + len(inputs), compute)
        total = total_examples(figures[1])
        ctx.grads = [
            part.div_(total).to(tensor.dtype) if there else None
            for part, tensor, there in zip(sums, tensors, figures[2:].tolist(), strict=True)
        ]
        return figures[0] / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * cotangent.to(grad.dtype) for grad in ctx.grads]
        return None, None, None, *scaled


def total_examples(number: Tensor) -> float:
    """The sum of n_r over processes, on the host."""
    total = float(number)
    if total <= 0:
        raise ValueError("examples: expected at least one example in some process; got none in all")
    return total


def together(loss: Callable[..., Tensor], device: torch.device) -> AbstractContextManager[None]:
    """A block in which an error in one process of `loss` is raised in all."""
    return loss.processes.together(device) if isinstance(loss, DataParallel) else nullcontext()


def averaged(loss: Callable[..., Tensor]) -> Averaged | DataParallel:
    """The mean of `loss` over a list of batches; see :class:`Averaged`."""
    return loss.averaged() if isinstance(loss, DataParallel) else Averaged(loss)
