"""What a loss reads beside its arguments: a trace that it has outdated is not used, however the value is reached."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import hvp_engine as hvp
from hvp_engine._support.bytecode import names_read
from hvp_engine._support.reading import free_variables

SOLVER = hvp.Neumann(3, 0.05)
RATE = 0.1
X, Y = torch.linspace(-1, 1, 30).reshape(10, 3), torch.linspace(0, 1, 10)

Loss = Callable[[Tensor, Tensor, Any], Tensor]
Case = tuple[Loss, Callable[[float], None]]


def fit(w: Tensor, h: Tensor, factor: Any) -> Tensor:
    return ((X @ w - Y) ** 2).mean() + h.exp() * w.square().sum() + factor * (w**4).sum()


class Constants:
    rate = 0.1


@dataclass
class Settings:
    rate: float = 0.1


class Slotted:
    __slots__ = ("rate",)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.1
        self.calls = 0
        self.seen: Tensor | None = None
        self.layer = nn.Linear(3, 1, bias=False)
        self.drop = nn.Dropout(0.0)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x
        return self.drop(self.layer(x))[:, 0] * (1 + self.rate + self.shift)


class Trainer:
    def __init__(self) -> None:
        self.rate = 0.1
        self.calls = 0

    @property
    def factor(self) -> float:
        return 2 * self.rate

    def penalty(self, w: Tensor) -> Tensor:
        return self.factor * (w**4).sum()

    def train(self, w: Tensor, h: Tensor, batch: Any) -> Tensor:
        self.calls += 1
        return fit(w, h, 0.0) + self.penalty(w)

    def __call__(self, w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return self.train(w, h, batch)


def setter(owner: Any, name: Any) -> Callable[[float], None]:
    if isinstance(owner, (dict, list)):
        return lambda value: owner.__setitem__(name, value)
    return lambda value: setattr(owner, name, value)


def variable_of_a_module() -> Case:
    global RATE
    RATE = 0.1

    def change(value: float) -> None:
        global RATE
        RATE = value

    return lambda w, h, b: fit(w, h, RATE), change


def variable_of_a_function() -> Case:
    rate = 0.1

    def change(value: float) -> None:
        nonlocal rate
        rate = value

    return lambda w, h, b: fit(w, h, rate), change


def another_tensor() -> Case:
    held = {"rate": torch.tensor(0.1)}
    return lambda w, h, b: fit(w, h, held["rate"]), lambda value: held.update(rate=torch.tensor(value))


def attribute_of(owner: Any) -> Callable[[], Case]:
    def made() -> Case:
        owner.rate = 0.1
        return lambda w, h, b: fit(w, h, owner.rate), setter(owner, "rate")

    return made


def item_of_a_dict() -> Case:
    rates = {"first": [0.1, 0.2]}
    return lambda w, h, b: fit(w, h, rates["first"][0]), setter(rates["first"], 0)


def item_of_an_array() -> Case:
    rates = numpy.array([0.1, numpy.nan])
    return lambda w, h, b: fit(w, h, float(rates[0])), lambda value: rates.__setitem__(0, value)


def length_of_a_list() -> Case:
    rates = [0.1]
    return lambda w, h, b: fit(w, h, sum(rates)), rates.append


def branch() -> Case:
    settings = Settings()
    return lambda w, h, b: fit(w, h, 1.0 if settings.rate > 0.3 else 0.1), setter(settings, "rate")


def function_that_is_called() -> Case:
    settings = Settings()

    def factor() -> float:
        return settings.rate

    return lambda w, h, b: fit(w, h, factor()), setter(settings, "rate")


def default_of_an_argument() -> Case:
    settings = Settings()

    def loss(w: Tensor, h: Tensor, b: Any, *, settings: Settings = settings) -> Tensor:
        return fit(w, h, settings.rate)

    return loss, setter(settings, "rate")


def partial() -> Case:
    settings = Settings()
    return functools.partial(lambda s, w, h, b: fit(w, h, s.rate), settings), setter(settings, "rate")


def decorated() -> Case:
    settings = Settings()

    def wrap(function: Loss) -> Loss:
        @functools.wraps(function)
        def wrapped(*arguments: Any) -> Tensor:
            return function(*arguments)

        return wrapped

    return wrap(lambda w, h, b: fit(w, h, settings.rate)), setter(settings, "rate")


def method() -> Case:
    trainer = Trainer()
    return trainer.train, setter(trainer, "rate")


def object_that_is_called() -> Case:
    trainer = Trainer()
    return trainer, setter(trainer, "rate")


def module(call: Callable[[Net], Callable[[Tensor], Tensor]], name: str) -> Callable[[], Case]:
    def made() -> Case:
        net = Net()
        called = call(net)
        change = setter(net, name) if name == "rate" else lambda value: setattr(net, name, torch.tensor(value))
        return lambda w, h, b: ((called(w) - Y) ** 2).mean() + h.exp() * w.square().sum(), change

    return made


def functional(net: Net) -> Callable[[Tensor], Tensor]:
    function = hvp.functional(net)
    return lambda w: function({"layer.weight": w[None]}, X)


def functional_call(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda w: torch.func.functional_call(net, {"layer.weight": w[None]}, (X,))


CASES: dict[str, Callable[[], Case]] = {
    "variable of a module": variable_of_a_module,
    "variable of a function": variable_of_a_function,
    "another tensor": another_tensor,
    "attribute": attribute_of(types.SimpleNamespace()),
    "attribute of a class": attribute_of(Constants),
    "attribute of a dataclass": attribute_of(Settings()),
    "slot": attribute_of(Slotted()),
    "item of a dict": item_of_a_dict,
    "item of an array": item_of_an_array,
    "length of a list": length_of_a_list,
    "branch": branch,
    "function that is called": function_that_is_called,
    "default of an argument": default_of_an_argument,
    "partial": partial,
    "decorated": decorated,
    "method": method,
    "object that is called": object_that_is_called,
    "attribute of a module": module(functional, "rate"),
    "attribute of a module, functional_call": module(functional_call, "rate"),
    "buffer of a module": module(functional, "shift"),
}


def both(loss: Loss, engine: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor], hvp.Hypergradient]:
    """The hypergradient by the engine, and by eager."""
    w, h = torch.tensor([0.5, -0.25, 1.0]), torch.tensor(-1.0)
    ours, eager = (hvp.Hypergradient(loss, lambda w, h, b: fit(w, h, 0.0), SOLVER, name) for name in (engine, "eager"))
    return lambda: ours(w, h, None, None).grads, lambda: eager(w, h, None, None).grads, ours


@pytest.mark.parametrize("engine", ["linearized", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_a_value_that_changes_is_seen_at_once(name: str, engine: str) -> None:
    loss, change = CASES[name]()
    ours, eager, hypergradient = both(loss, engine)
    before = [ours() for _ in range(3)][-1]
    torch.testing.assert_close(before, eager())
    change(0.7)
    if engine == "linearized":
        with pytest.warns(
            UserWarning, match=r"(?i)replaced by 'eager' for train_loss: it reads .*(rate|shift).*, which has"
        ):
            ours()
    for value in (0.7, 0.5):
        change(value)
        torch.testing.assert_close(ours(), eager())
        assert not torch.allclose(before, eager(), rtol=1e-3)


def test_auto_goes_on_without_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    ours, eager, hypergradient = both(lambda w, h, b: fit(w, h, settings.rate), "auto")
    ours()
    engine = hypergradient.engine
    assert isinstance(engine, hvp.engines.AutoEngine)
    (choice,) = engine.choices.values()
    choice.engine = engine._linearized
    with pytest.warns(UserWarning, match="it reads settings.rate, which has changed since it was traced; a loss must"):
        for step in range(4):
            settings.rate = 0.1 + 0.1 * step
            torch.testing.assert_close(ours(), eager())
    assert "recorded: linearized was given up: it reads settings.rate" in hypergradient.report()


def test_a_validation_loss_is_watched_too() -> None:
    settings = Settings()
    w, h = torch.tensor([0.5, -0.25, 1.0]), torch.tensor(-1.0)
    hypergradient = hvp.Hypergradient(
        lambda w, h, b: fit(w, h, 0.1), lambda w, h, b: fit(w, h, settings.rate), SOLVER, "linearized"
    )
    with pytest.warns(UserWarning, match="gradient of val_loss is replaced by autograd's: it reads settings.rate"):
        for step in range(4):
            settings.rate = 0.1 + 0.05 * step
            expected = fit(w, h, settings.rate)
            torch.testing.assert_close(hypergradient(w, h, None, None).val_loss, expected)


def test_what_is_only_counted_or_collected_does_not_matter() -> None:
    seen: list[float] = []
    count, trainer = {"calls": 0}, Trainer()

    def loss(w: Tensor, h: Tensor, b: Any) -> Tensor:
        seen.append(1.0)
        count["calls"] += 1
        return trainer.train(w, h, b)

    ours, eager, hypergradient = both(loss, "linearized")
    for _ in range(12):
        torch.testing.assert_close(ours(), eager())
    engine = hypergradient.engine
    assert isinstance(engine, hvp.engines.LinearizedEngine) and engine.traces == 1
    assert len(seen) > 12 and trainer.calls == len(seen) == count["calls"]


def test_what_a_module_counts_and_keeps_does_not_matter() -> None:
    net = Net()
    called = functional(net)
    ours, eager, hypergradient = both(lambda w, h, b: fit(w, h, 0.1) + called(w).square().mean(), "linearized")
    for _ in range(12):
        torch.testing.assert_close(ours(), eager())
        net(torch.randn(2, 3))
    engine = hypergradient.engine
    assert isinstance(engine, hvp.engines.LinearizedEngine) and engine.traces == 1
    net.eval()
    torch.testing.assert_close(ours(), eager())
    assert engine.traces == 2
    net.drop.p = 0.5
    with pytest.warns(UserWarning, match="it reads .*drop.p, which has changed"):
        ours()


def test_equal_numbers_are_one_and_autocast_is_another() -> None:
    settings = Settings()
    ours, _, hypergradient = both(lambda w, h, b: fit(w, h, settings.rate), "linearized")
    for _ in range(3):
        settings.rate = float("0.1")
        ours()
    engine = hypergradient.engine
    assert isinstance(engine, hvp.engines.LinearizedEngine) and engine.traces == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours()
    assert engine.traces == 2


def test_names_that_code_reads() -> None:
    def code(self: Any, w: Any) -> Any:
        global RATE
        RATE += 1
        self.count += 1
        self.log.append(w)
        return w * self.rate + sum(x * self.scale for x in (1, 2)) + X

    read = names_read(code.__code__)
    assert read.globals == {"X", "sum"} and read.attributes >= {"rate", "scale"}
    assert not read.attributes & {"count", "log"} and not read.cells - {"self"}


def test_an_object_that_has_every_attribute_is_no_endless_path() -> None:
    class Config(dict[str, Any]):
        def __getattr__(self, name: str) -> Any:
            return self.setdefault(name, Config())

    config = Config(rate=0.1)
    ours, eager, _ = both(lambda w, h, b: fit(w, h, config.rate), "linearized")
    torch.testing.assert_close(ours(), eager())
    assert config == {"rate": 0.1}
    config["rate"] = 0.7
    with pytest.warns(UserWarning, match=r"it reads config\['rate'\], which has changed"):
        torch.testing.assert_close(ours(), eager())


def test_code_of_installed_packages_is_not_followed() -> None:
    names = {variable.name for variable in free_variables([lambda w: torch.special.expit(w).sum() * Constants.rate])}
    assert names == {"torch", "Constants", "Constants.rate"}
