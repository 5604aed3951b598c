"""Seeded generator of the problems that the shipped experts learn and are measured on.

Six kinds: ``math`` (GSM8K style), ``code`` (HumanEval style one-liners), ``choice`` (A to D),
``lookup`` (read an answer off a small table), and two in ARC's style, with four options: ``mc``
(recall a fact and find it among the options) and ``traits`` (which option has a property). Every
item carries a ``key``, the canonical form of what has to be computed: for ``math`` its chain of
equations, whatever the names and the wording; for ``traits`` the property and the set of options.
The split is a hash of that key, so a test item never shares its key with a training item.

``python -m dlmom_rs.zoo.problems --write`` produces the shipped ``data/tinygsm.jsonl``,
``data/tinycode.jsonl`` and ``data/tinymc.jsonl``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Kind = Literal["math", "code", "choice", "lookup", "mc", "traits"]
Split = Literal["train", "test"]

KINDS: tuple[Kind, ...] = ("math", "code", "choice", "lookup", "mc", "traits")
MAX_STEPS = 6
TEST_SHARE = 8
TINYGSM_ROWS = 500
TINYGSM_SEED = 20_250
TINYCODE_ROWS = 200
TINYCODE_SEED = 20_251
TINYMC_ROWS = 300
TINYMC_SEED = 20_252
DATA = Path(__file__).resolve().parent.parent / "data"
TINYGSM_PATH = DATA / "tinygsm.jsonl"
TINYCODE_PATH = DATA / "tinycode.jsonl"
TINYMC_PATH = DATA / "tinymc.jsonl"

_MASK = (1 << 64) - 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class Item:
    """One problem.

    ``question`` is the user's turn and ``answer`` the whole assistant's turn. ``gold`` is what
    scoring compares with: the number, letter or value after ``####``, or for ``code`` the answer
    itself. ``steps`` is the number of equations (0 for kinds other than ``math``).
    """

    kind: Kind
    question: str
    answer: str
    gold: str
    key: str
    steps: int


class Draws:
    """A stream of reproducible draws (splitmix64), keyed by a seed and any number of labels.

    The standard library promises the same sequence across versions only for ``random.random``, and
    the shipped file is compared byte for byte, so the generator is ours.
    """

    def __init__(self, seed: int, *labels: str) -> None:
        text = "\x1f".join([str(seed), *labels])
        self._state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """An integer in ``0..n-1``. ValueError if ``n < 1``."""
        if n < 1:
            raise ValueError(f"below() needs n >= 1, got {n}")
        return (self._next() * n) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in ``low..high``, both included. ValueError if ``high < low``."""
        return low + self.below(high - low + 1)

    def chance(self, numerator: int, denominator: int) -> bool:
        """True with probability ``numerator / denominator``."""
        return self.below(denominator) < numerator

    def pick(self, options: Sequence[_T]) -> _T:
        """One of ``options``, uniformly."""
        return options[self.below(len(options))]

    def weighted(self, weights: Sequence[int]) -> int:
        """An index, with probability proportional to its integer weight."""
        left = self.below(sum(weights))
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        raise AssertionError("unreachable: left starts below the sum of the weights")

    def sample(self, options: Sequence[_T], count: int) -> list[_T]:
        """``count`` different positions of ``options``, in random order."""
        pool = list(options)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


class _Infeasible(Exception):
    """The drawn numbers do not fit the template; the caller draws again."""


def _need(condition: bool) -> None:
    if not condition:
        raise _Infeasible


NAMES = ("Tom", "Mia", "Sam", "Eva", "Leo", "Zoe", "Max", "Ida", "Ben", "Ann", "Omar", "Lena")
THINGS = (
    "apples", "books", "cards", "coins", "stamps", "pens", "shells", "marbles", "eggs", "toys",
    "cakes", "beads",
)  # fmt: skip
PLANTS = ("trees", "roses", "beans", "tulips", "carrots")
PARTS = ((2, "half"), (3, "a third"), (4, "a quarter"), (5, "a fifth"))
PERCENTS = ((10, 10), (5, 20), (4, 25), (2, 50))
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


class _Work:
    """The worked solution under construction: one line and one equation for each step."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.equations: list[str] = []

    def do(self, a: int, op: str, b: int, say: str) -> int:
        """The result of ``a op b``; writes ``say`` with ``{}`` replaced by the equation."""
        if op == "/":
            _need(b > 0 and a % b == 0)
            value = a // b
        else:
            value = a + b if op == "+" else a - b if op == "-" else a * b
        _need(0 < value <= 9999)
        equation = f"{a} {op} {b} = {value}"
        self.equations.append(equation)
        self.lines.append(say.replace("{}", equation))
        return value


@dataclass(frozen=True)
class _Scale:
    """Ranges of one problem's numbers: a quantity, a change, a factor; and a product's cap."""

    start: tuple[int, int]
    change: tuple[int, int]
    unit: tuple[int, int]
    cap: int


_SCALES = (
    _Scale((4, 24), (2, 12), (2, 9), 120),
    _Scale((12, 80), (3, 40), (3, 12), 300),
    _Scale((60, 400), (15, 150), (5, 25), 1500),
)
_SCALE_WEIGHTS = (52, 41, 7)


@dataclass(frozen=True)
class _Setting:
    """Sentences for one quantity that changes. ``{n}``, ``{m}`` are people, ``{o}`` the objects."""

    start: tuple[str, ...]
    have: str
    ask: tuple[str, ...]
    add: tuple[str, ...]
    sub: tuple[str, ...]
    double: tuple[str, ...]
    times: tuple[str, ...]
    half: tuple[str, ...]
    share: tuple[str, ...]
    part: tuple[str, ...]
    groups_in: tuple[str, ...]
    groups_out: tuple[str, ...]
    unit: str


_SETTINGS = (
    _Setting(
        start=("{n} has {v} {o}.", "{n} starts with {v} {o}.", "{n} owns {v} {o}."),
        have="{n} has {} {o}.",
        ask=("How many {o} does {n} have now?", "How many {o} are left for {n}?"),
        add=("{n} buys {k} more {o}.", "{n} finds {k} {o}.", "{m} gives {n} {k} {o}.",
             "{n} wins {k} more {o}."),
        sub=("{n} gives {k} {o} to {m}.", "{n} loses {k} {o}.", "{n} sells {k} {o}.",
             "{m} takes {k} of the {o}."),
        double=("{n} doubles the number of {o}.", "{m} brings as many {o} as {n} has."),
        times=("After a trade {n} has {t} as many {o}.",),
        half=("{n} gives half of the {o} to {m}.", "{n} loses half of the {o}."),
        share=("{n} makes {k} equal piles and keeps one pile.",
               "{n} shares the {o} equally among {k} people and takes one share."),
        part=("{n} gives {p} of the {o} to {m}.", "{n} sells {p} of the {o}."),
        groups_in=("{n} buys {a} boxes with {b} {o} each.", "{a} friends give {n} {b} {o} each."),
        groups_out=("{n} gives {b} {o} to each of {a} friends.",
                    "{n} sells {a} bags with {b} {o} each."),
        unit=" {o}",
    ),
    _Setting(
        start=("{n} has ${v}.", "{n} starts the week with ${v}.", "{n} has ${v} in the bank."),
        have="{n} has {} dollars.",
        ask=("How much money does {n} have now?", "How many dollars are left for {n}?"),
        add=("{n} earns ${k}.", "{m} pays {n} ${k}.", "{n} gets ${k} as a gift."),
        sub=("{n} spends ${k} on food.", "{n} pays ${k} for a book.", "{n} lends {m} ${k}."),
        double=("{n} doubles the money.",),
        times=("A prize makes it {t} as much money.",),
        half=("{n} spends half of the money.", "{n} gives half of the money to {m}."),
        share=("{n} shares the money equally among {k} people and takes one share.",),
        part=("{n} spends {p} of the money.", "{n} gives {p} of the money to {m}."),
        groups_in=("{n} works {a} hours for ${b} an hour.", "{n} sells {a} toys for ${b} each."),
        groups_out=("{n} buys {a} tickets for ${b} each.", "{n} buys {a} books for ${b} each."),
        unit=" dollars",
    ),
    _Setting(
        start=("A bus starts with {v} people.", "There are {v} people on a train."),
        have="There are {} people.",
        ask=("How many people are there now?", "How many people are left?"),
        add=("Then {k} people get on.", "At the park {k} people get on."),
        sub=("Then {k} people get off.", "At the school {k} people get off."),
        double=("At the next stop the number of people doubles.",),
        times=("In the city there are {t} as many people.",),
        half=("At the next stop half of the people get off.",),
        share=("The people split into {k} equal groups and one group stays.",),
        part=("At the park {p} of the people get off.",),
        groups_in=("Then {a} groups of {b} people get on.",),
        groups_out=("Then {a} groups of {b} people get off.",),
        unit=" people",
    ),
    _Setting(
        start=("A tank holds {v} litres of water.", "There are {v} litres of water in a tank."),
        have="The tank has {} litres.",
        ask=("How many litres are in the tank now?", "How many litres are left?"),
        add=("Rain adds {k} litres.", "{n} adds {k} litres."),
        sub=("The garden takes {k} litres.", "{n} uses {k} litres.", "Then {k} litres leak out."),
        double=("A storm doubles the water.",),
        times=("After a storm there is {t} as much water.",),
        half=("Half of the water leaks out.", "{n} uses half of the water."),
        share=("The water is split into {k} equal parts and one part stays.",),
        part=("{n} uses {p} of the water.",),
        groups_in=("{n} adds {a} cans of {b} litres each.",),
        groups_out=("{n} fills {a} cans with {b} litres each.",),
        unit=" litres",
    ),
    _Setting(
        start=("{n} scores {v} points in a game.", "{n} has {v} points."),
        have="{n} has {} points.",
        ask=("How many points does {n} have now?", "What is the score of {n}?"),
        add=("{n} wins {k} points.", "A bonus adds {k} points."),
        sub=("{n} loses {k} points.", "A mistake costs {k} points."),
        double=("A bonus doubles the points.",),
        times=("A bonus makes it {t} as many points.",),
        half=("{n} loses half of the points.",),
        share=("The points are shared equally among {k} players and {n} takes one share.",),
        part=("{n} loses {p} of the points.",),
        groups_in=("{n} wins {a} rounds with {b} points each.",),
        groups_out=("{n} makes {a} mistakes that cost {b} points each.",),
        unit=" points",
    ),
    _Setting(
        start=("A shop has {v} {o}.", "There are {v} {o} in a shop."),
        have="The shop has {} {o}.",
        ask=("How many {o} does the shop have now?", "How many {o} are left in the shop?"),
        add=("A truck brings {k} {o}.", "The shop gets {k} more {o}."),
        sub=("The shop sells {k} {o}.", "{n} buys {k} {o}.", "Then {k} {o} are lost."),
        double=("The shop doubles the number of {o}.",),
        times=("After a sale there are {t} as many {o}.",),
        half=("The shop sells half of the {o}.", "{n} buys half of the {o}."),
        share=("The {o} are split into {k} equal piles and the shop keeps one pile.",),
        part=("The shop sells {p} of the {o}.",),
        groups_in=("A truck brings {a} boxes with {b} {o} each.",),
        groups_out=("Then {a} people buy {b} {o} each.",),
        unit=" {o}",
    ),
    _Setting(
        start=("There are {v} {o} in a garden.", "{n} plants {v} {o} in a garden."),
        have="The garden has {} {o}.",
        ask=("How many {o} are in the garden now?", "How many {o} are left?"),
        add=("{n} plants {k} more {o}.", "In spring {k} {o} grow."),
        sub=("{n} cuts {k} {o}.", "A storm kills {k} {o}."),
        double=("In spring the number of {o} doubles.",),
        times=("A year later there are {t} as many {o}.",),
        half=("A storm kills half of the {o}.",),
        share=("The {o} are split into {k} equal rows and one row stays.",),
        part=("{n} cuts {p} of the {o}.",),
        groups_in=("{n} plants {a} rows of {b} {o} each.",),
        groups_out=("{n} cuts {a} rows of {b} {o} each.",),
        unit=" {o}",
    ),
)  # fmt: skip
_PLANT_SETTING = 6

_MOVES = ("add", "sub", "double", "times", "half", "share", "part", "groups_in", "groups_out")
_MOVE_WEIGHTS = (16, 20, 8, 6, 12, 9, 9, 10, 8)
_MOVE_COST = {"part": 2, "groups_in": 2, "groups_out": 2}


def _fill(text: str, **values: object) -> str:
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def _change(
    d: Draws, setting: _Setting, move: str, v: int, *, s: _Scale, work: _Work, f: _Filler
) -> tuple[int, str]:
    """Apply one move to the quantity ``v``; the new quantity and the sentence that tells it."""
    have = f(setting.have)
    sentences: tuple[str, ...] = getattr(setting, move)
    text = f(d.pick(sentences))
    if move == "add":
        k = d.between(*s.change)
        return work.do(v, "+", k, have), _fill(text, k=k)
    if move == "sub":
        _need(v - 2 >= s.change[0])
        k = d.between(s.change[0], min(s.change[1], v - 2))
        return work.do(v, "-", k, have), _fill(text, k=k)
    if move in ("double", "times"):
        k = 2 if move == "double" else d.between(2, 5)
        _need(v * k <= s.cap)
        return work.do(v, "*", k, have), _fill(text, t=TIMES[k])
    if move == "half":
        _need(v % 2 == 0 and v >= 4)
        return work.do(v, "/", 2, have), text
    if move == "share":
        divisors = [k for k in range(2, 10) if v % k == 0 and v // k >= 2]
        _need(bool(divisors))
        k = d.pick(divisors)
        return work.do(v, "/", k, have), _fill(text, k=k)
    if move == "part":
        options = [(k, p) for k, p in PARTS[1:] if v % k == 0 and v // k >= 2]
        options += [(k, f"{p}%") for k, p in PERCENTS if v % k == 0 and v // k >= 2]
        _need(bool(options))
        k, p = d.pick(options)
        taken = work.do(v, "/", k, f"That is {{}}{f(setting.unit)}.")
        return work.do(v, "-", taken, have), _fill(text, p=p)
    a, b = d.between(2, 9), d.between(*s.unit)
    if move == "groups_in":
        _need(v + a * b <= s.cap)
        got = work.do(a, "*", b, f"That is {{}}{f(setting.unit)}.")
        return work.do(v, "+", got, have), _fill(text, a=a, b=b)
    _need(v - a * b >= 2)
    gone = work.do(a, "*", b, f"That is {{}}{f(setting.unit)}.")
    return work.do(v, "-", gone, have), _fill(text, a=a, b=b)


class _Filler:
    """Replaces ``{n}``, ``{m}`` and ``{o}`` by the people and the objects of one problem."""

    def __init__(self, n: str, m: str, o: str) -> None:
        self._values = {"n": n, "m": m, "o": o}

    def __call__(self, text: str) -> str:
        return _fill(text, **self._values)


def _chain(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    which = d.weighted((40, 16, 8, 8, 8, 12, 8))
    setting = _SETTINGS[which]
    n, m = d.sample(NAMES, 2)
    f = _Filler(n, m, d.pick(PLANTS if which == _PLANT_SETTING else THINGS))
    v = d.between(*s.start)
    said = [_fill(f(d.pick(setting.start)), v=v)]
    last = ""
    while len(work.lines) < steps:
        move = _MOVES[d.weighted(_MOVE_WEIGHTS)]
        _need(move != last or move in ("add", "sub"))
        _need(len(work.lines) + _MOVE_COST.get(move, 1) <= steps)
        v, sentence = _change(d, setting, move, v, s=s, work=work, f=f)
        said.append(sentence)
        last = move
    said.append(f(d.pick(setting.ask)))
    return " ".join(said)


def _relation(
    d: Draws, name: str, other: str, v: int, *, thing: str, s: _Scale, work: _Work
) -> tuple[int, str]:
    """``name``'s quantity told relative to that of ``other``, who has ``v``."""
    have = f"{name} has {{}} {thing}."
    move = d.weighted((30, 30, 25, 15))
    if move == 0:
        k = d.between(*s.change)
        text = d.pick((f"{name} has {k} more {thing} than {other}.",
                       f"{name} has {k} more than {other}."))  # fmt: skip
        return work.do(v, "+", k, have), text
    if move == 1:
        _need(v - 2 >= s.change[0])
        k = d.between(s.change[0], min(s.change[1], v - 2))
        text = d.pick((f"{name} has {k} fewer {thing} than {other}.",
                       f"{name} has {k} less than {other}."))  # fmt: skip
        return work.do(v, "-", k, have), text
    if move == 2:
        k = d.between(2, 5)
        _need(v * k <= s.cap)
        return work.do(v, "*", k, have), f"{name} has {TIMES[k]} as many {thing} as {other}."
    _need(v % 2 == 0 and v >= 4)
    return work.do(v, "/", 2, have), f"{name} has half as many {thing} as {other}."


def _compare(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    ask = d.pick(("last", "all", "pair", "difference"))
    relations = {"last": steps, "all": steps // 2, "pair": steps - 1, "difference": steps - 1}[ask]
    _need(1 <= relations <= 4 and (ask != "all" or steps % 2 == 0))
    people = d.sample(NAMES, relations + 1)
    thing = d.pick(THINGS)
    values = [d.between(*s.start)]
    said = [f"{people[0]} has {values[0]} {thing}."]
    for i in range(relations):
        v, text = _relation(d, people[i + 1], people[i], values[i], thing=thing, s=s, work=work)
        values.append(v)
        said.append(text)
    if ask == "last":
        return " ".join([*said, f"How many {thing} does {people[-1]} have?"])
    if ask == "all":
        total = values[0]
        for v in values[1:]:
            total = work.do(total, "+", v, f"Together that is {{}} {thing}.")
        return " ".join([*said, f"How many {thing} do they have together?"])
    first, last = people[0], people[-1]
    if ask == "pair":
        work.do(values[0], "+", values[-1], f"{first} and {last} have {{}} {thing}.")
        return " ".join([*said, f"How many {thing} do {first} and {last} have together?"])
    high, low = max(values[0], values[-1]), min(values[0], values[-1])
    _need(high > low)
    work.do(high, "-", low, f"The difference is {{}} {thing}.")
    more, less = (first, last) if values[0] > values[-1] else (last, first)
    return " ".join([*said, f"How many more {thing} does {more} have than {less}?"])


def _shopping(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    name = d.pick(NAMES)
    kinds = (steps + 1) // 2
    goods = d.sample(THINGS, kinds)
    counts = [d.between(2, 9) for _ in goods]
    prices = [d.between(*s.unit) for _ in goods]
    parts = [f"{c} {g} for ${p} each" for c, g, p in zip(counts, goods, prices, strict=True)]
    listed = parts[0] if kinds == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    said = [d.pick((f"{name} buys {listed}.", f"{name} orders {listed}."))]
    costs = [
        work.do(c, "*", p, f"The {g} cost {{}} dollars.")
        for c, g, p in zip(counts, goods, prices, strict=True)
    ]
    total = costs[0]
    for cost in costs[1:]:
        total = work.do(total, "+", cost, "The total is {} dollars.")
    if steps % 2:
        return " ".join([*said, d.pick(("How many dollars does {n} pay?", "How much is the bill?"))
                         .replace("{n}", name)])  # fmt: skip
    ending = d.weighted((4, 3, 3))
    if ending == 0:
        paid = (total // 50 + 1) * 50 if d.chance(1, 2) else total + d.between(2, 20)
        work.do(paid, "-", total, "The change is {} dollars.")
        said += [f"{name} pays with ${paid}.", "How much change is there?"]
    elif ending == 1:
        fee = d.between(2, 15)
        work.do(total, "+", fee, "With delivery it is {} dollars.")
        said += [f"Delivery costs ${fee}.", "How many dollars is that in all?"]
    else:
        off = d.between(2, min(20, total - 1))
        work.do(total, "-", off, "With the coupon it is {} dollars.")
        said += [f"A coupon takes ${off} off.", f"How many dollars does {name} pay?"]
    return " ".join(said)


def _wages(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    name = d.pick(NAMES)
    hours, days, pay = d.between(2, 9), d.between(2, 6), d.between(max(4, s.unit[0]), s.unit[1])
    said: list[str]
    if steps == 1:
        money = work.do(hours, "*", pay, f"{name} earns {{}} dollars.")
        said = [f"{name} works {hours} hours for ${pay} an hour."]
    else:
        total = work.do(hours, "*", days, f"{name} works {{}} hours.")
        money = work.do(total, "*", pay, f"{name} earns {{}} dollars.")
        said = [f"{name} works {hours} hours a day for {days} days.",
                f"The pay is ${pay} an hour."]  # fmt: skip
    for extra in range(max(0, steps - 2)):
        if extra % 2 == 0:
            bonus = d.between(*s.change)
            money = work.do(money, "+", bonus, f"{name} has {{}} dollars.")
            said.append(f"{name} gets a bonus of ${bonus}.")
        elif d.chance(1, 2) and money % 2 == 0:
            money = work.do(money, "/", 2, f"{name} has {{}} dollars.")
            said.append(f"{name} saves half of it and spends the rest.")
        else:
            _need(money - 2 >= s.change[0])
            spent = d.between(s.change[0], min(s.change[1], money - 2))
            money = work.do(money, "-", spent, f"{name} has {{}} dollars.")
            said.append(f"{name} spends ${spent}.")
    ask = f"How many dollars does {name} have?" if steps > 2 else f"How much does {name} earn?"
    return " ".join([*said, ask])


def _packing(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    name, thing = d.pick(NAMES), d.pick(THINGS)
    boxes, per = d.between(2, 12), d.between(*s.unit)
    total = work.do(boxes, "*", per, f"There are {{}} {thing}.")
    said = [d.pick((f"{name} has {boxes} boxes with {per} {thing} each.",
                    f"There are {boxes} rows of {per} {thing}."))]  # fmt: skip
    bag = d.between(2, 9)
    if steps == 1:
        return " ".join([*said, f"How many {thing} are there?"])
    if steps >= 4:
        extra = d.between(*s.change)
        total = work.do(total, "+", extra, f"There are {{}} {thing}.")
        said.append(f"{name} makes {extra} more.")
    if steps >= 3:
        broken = total % bag + bag * d.below(3)
        _need(2 <= broken < total)
        total = work.do(total, "-", broken, f"There are {{}} {thing}.")
        said.append(d.pick((f"{broken} {thing} are broken.", f"{name} throws away {broken}.")))
    bags = work.do(total, "/", bag, "That makes {} bags.")
    said.append(f"{name} packs them into bags of {bag}.")
    if steps >= 5:
        price = d.between(2, 9)
        money = work.do(bags, "*", price, "They bring {} dollars.")
        said.append(f"Each bag sells for ${price}.")
        if steps == 6:
            cost = d.between(2, min(60, max(2, money - 2)))
            work.do(money, "-", cost, "The profit is {} dollars.")
            return " ".join([*said, f"The bags cost ${cost}. How much profit is there?"])
        return " ".join([*said, "How many dollars do they bring?"])
    return " ".join([*said, "How many bags are there?"])


def _travel(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    name = d.pick(NAMES)
    legs = (steps + 1) // 2
    ways = ("drives", "rides", "walks") if legs > 1 else (d.pick(("drives", "rides", "walks")),)
    said, sums = [], []
    for i in range(legs):
        hours, speed = d.between(2, 9), d.between(s.unit[0] + 1, s.unit[1] + 10)
        said.append(f"{name} {ways[i]} {hours} hours at {speed} km an hour.")
        sums.append(work.do(hours, "*", speed, f"{name} {ways[i]} {{}} km."))
    done = sums[0]
    for leg in sums[1:]:
        done = work.do(done, "+", leg, "So far it is {} km.")
    if steps % 2:
        return " ".join([*said, "How many km is that in all?"])
    trip = done + d.between(2, 99)
    work.do(trip, "-", done, "There are {} km left.")
    return " ".join([f"A trip is {trip} km long.", *said, "How many km are left?"])


def _reading(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    name = d.pick(NAMES)
    rates = [(d.between(*s.unit) + 2, d.between(2, 9)) for _ in range(2)]
    said = [f"{name} reads {rates[0][0]} pages a day for {rates[0][1]} days."]
    done = work.do(*_spread(rates[0]), f"{name} reads {{}} pages.")
    if steps >= 4:
        said.append(f"Then {name} reads {rates[1][0]} pages a day for {rates[1][1]} days.")
        more = work.do(*_spread(rates[1]), f"Then {name} reads {{}} pages.")
        done = work.do(done, "+", more, "So far it is {} pages.")
    if steps == 1:
        return " ".join([*said, "How many pages is that?"])
    finish = steps in (3, 5)
    _need(steps <= 5)
    pace, days = d.between(3, 12), d.between(2, 9)
    left = pace * days if finish else d.between(5, 120)
    book = done + left
    work.do(book, "-", done, "There are {} pages left.")
    said.insert(0, f"A book has {book} pages.")
    if not finish:
        return " ".join([*said, "How many pages are left?"])
    work.do(left, "/", pace, "It takes {} days.")
    return " ".join([*said, f"Then it is {pace} pages a day.", "How many days does the rest take?"])


def _spread(rate: tuple[int, int]) -> tuple[int, str, int]:
    return rate[0], "*", rate[1]


def _saving(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    _need(1 <= steps <= 5)
    name = d.pick(NAMES)
    thing = d.pick(("bike", "phone", "guitar", "tent", "lamp"))
    weekly, weeks = d.between(2, 12), d.between(2, 12)
    need = weekly * weeks
    said: list[str] = []
    if steps == 1:
        said = [f"{name} needs ${need} for a {thing}."]
    else:
        had = d.between(*s.start)
        cost = need + had
        if steps == 2:
            said = [f"A {thing} costs ${cost}.", f"{name} has ${had}."]
        else:
            count = d.between(2, 5)
            _need(cost % count == 0)
            work.do(count, "*", cost // count, f"The {thing}s cost {{}} dollars.")
            said = [f"{name} wants {count} {thing}s for ${cost // count} each."]
            gift = 0
            if steps >= 4:
                _need(had >= 6)
                gift = d.between(2, had - 2)
                work.do(had - gift, "+", gift, f"{name} has {{}} dollars.")
            said.append(f"{name} has ${had - gift}.")
            if gift:
                said.append(f"A gift adds ${gift}.")
        work.do(cost, "-", had, f"{name} needs {{}} dollars.")
    work.do(need, "/", weekly, "It takes {} weeks.")
    said.append(f"{name} saves ${weekly} a week.")
    if steps == 5:
        per = d.between(2, 7)
        work.do(weeks, "*", per, f"{name} works {{}} hours.")
        said.append(f"That means {per} hours of work a week.")
        return " ".join([*said, f"How many hours does {name} work?"])
    return " ".join([*said, f"How many weeks does {name} need?"])


def _pool(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    _need(2 <= steps <= 6)
    count = 2 if steps == 2 else d.between(2, min(4, steps - 1))
    people = d.sample(NAMES, count)
    thing = d.pick(THINGS)
    values = [d.between(*s.start) for _ in people]
    said = [f"{p} finds {v} {thing}." for p, v in zip(people, values, strict=True)]
    total = values[0]
    for v in values[1:]:
        total = work.do(total, "+", v, f"Together that is {{}} {thing}.")
    for _ in range(steps - count):
        if d.chance(1, 2):
            k = d.between(*s.change)
            _need(total - k >= 4)
            total = work.do(total, "-", k, f"There are {{}} {thing}.")
            said.append(d.pick((f"They lose {k} {thing}.", f"They sell {k} {thing}.")))
        else:
            k = d.between(*s.change)
            total = work.do(total, "+", k, f"There are {{}} {thing}.")
            said.append(d.pick((f"They buy {k} more.", f"They get {k} more {thing}.")))
    shares = count if total % count == 0 else d.between(2, 9)
    work.do(total, "/", shares, f"Each gets {{}} {thing}.")
    if shares == count:
        return " ".join([*said, f"They share equally. How many {thing} does each one get?"])
    return " ".join([*said, f"They put the {thing} equally into {shares} boxes.",
                     f"How many {thing} are in each box?"])  # fmt: skip


def _field(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    _need(1 <= steps <= 4)
    long, wide = d.between(*s.start), d.between(*s.unit)
    _need(long > wide)
    said = [d.pick((f"A field is {long} metres long and {wide} metres wide.",
                    f"A room is {long} metres long and {wide} metres wide."))]  # fmt: skip
    if steps == 1 or (steps == 3 and d.chance(1, 2)):
        area = work.do(long, "*", wide, "The area is {} square metres.")
        if steps == 1:
            return " ".join([*said, "What is the area in square metres?"])
        price = d.between(2, 6)
        cost = work.do(area, "*", price, "The cost is {} dollars.")
        fee = d.between(5, 50)
        work.do(cost, "+", fee, "The total is {} dollars.")
        return " ".join([*said, f"A floor costs ${price} for each square metre.",
                         f"Delivery costs ${fee}.", "What is the total in dollars?"])  # fmt: skip
    side = work.do(long, "+", wide, "Two sides are {} metres.")
    fence = work.do(side, "*", 2, "The border is {} metres.")
    if steps == 2:
        return " ".join([*said, "How long is the border?"])
    price = d.between(2, 6)
    if steps == 4:
        gate = d.between(2, 9)
        fence = work.do(fence, "-", gate, "The fence is {} metres.")
        said.append(f"A gate takes {gate} metres of the border.")
    work.do(fence, "*", price, "The cost is {} dollars.")
    return " ".join([*said, f"A fence costs ${price} a metre.", "What does the fence cost?"])


def _average(d: Draws, steps: int, s: _Scale, work: _Work) -> str:
    _need(2 <= steps <= 5)
    name = d.pick(NAMES)
    values = [d.between(*s.start) for _ in range(steps)]
    rest = sum(values[:-1]) % steps
    values[-1] += -(values[-1] + rest) % steps
    total = values[0]
    for v in values[1:]:
        total = work.do(total, "+", v, "The sum is {}.")
    work.do(total, "/", steps, "The average is {}.")
    listed = ", ".join(str(v) for v in values[:-1]) + f" and {values[-1]}"
    what = d.pick(("points in {k} games", "km in {k} days", "dollars in {k} weeks"))
    what = _fill(what, k=steps)
    return f"{name} gets {listed} {what}. What is the average?"


def _clock(d: Draws, steps: int, _s: _Scale, work: _Work) -> str:
    _need(1 <= steps <= 5)
    name = d.pick(NAMES)
    hours = d.between(2, 9)
    total = work.do(hours, "*", 60, "That is {} minutes.")
    if steps == 1:
        return f"{name} sleeps {hours} hours. How many minutes is that?"
    extra = d.between(2, 59)
    total = work.do(total, "+", extra, "That is {} minutes.")
    said = [f"{name} works {hours} hours and {extra} minutes."]
    for _ in range(steps - 2):
        if d.chance(1, 2):
            k = d.between(2, 59)
            total = work.do(total, "-", k, "That is {} minutes.")
            said.append(f"A break of {k} minutes does not count.")
        else:
            k = d.between(2, 59)
            total = work.do(total, "+", k, "That is {} minutes.")
            said.append(f"Then {name} works {k} more minutes.")
    return " ".join([*said, f"How many minutes does {name} work?"])


def _ages(d: Draws, steps: int, _s: _Scale, work: _Work) -> str:
    _need(1 <= steps <= 5)
    people = d.sample(NAMES, 5)
    age = d.between(4, 30)
    said = [f"{people[0]} is {age} years old."]
    later = steps == 1 or d.chance(1, 2)
    relations = steps - 1 if later else steps
    _need(relations <= 4)
    for i in range(relations):
        name, other = people[i + 1], people[i]
        move = d.below(4)
        if move == 0:
            k = d.between(2, 20)
            age = work.do(age, "+", k, f"{name} is {{}} years old.")
            said.append(f"{name} is {k} years older than {other}.")
        elif move == 1:
            _need(age > 5)
            k = d.between(2, age - 3)
            age = work.do(age, "-", k, f"{name} is {{}} years old.")
            said.append(f"{name} is {k} years younger than {other}.")
        elif move == 2:
            k = d.between(2, 3)
            _need(age * k <= 99)
            age = work.do(age, "*", k, f"{name} is {{}} years old.")
            said.append(f"{name} is {TIMES[k]} as old as {other}.")
        else:
            _need(age % 2 == 0 and age >= 6)
            age = work.do(age, "/", 2, f"{name} is {{}} years old.")
            said.append(f"{name} is half as old as {other}.")
    last = people[relations]
    if not later:
        return " ".join([*said, f"How old is {last}?"])
    k = d.between(2, 20)
    work.do(age, "+", k, f"Then {last} is {{}} years old.")
    return " ".join([*said, f"How old is {last} in {k} years?"])


_Family = Callable[[Draws, int, _Scale, _Work], str]
_FAMILIES: tuple[tuple[_Family, int], ...] = (
    (_chain, 40),
    (_compare, 14),
    (_shopping, 10),
    (_wages, 6),
    (_packing, 6),
    (_travel, 5),
    (_reading, 4),
    (_saving, 5),
    (_pool, 5),
    (_field, 4),
    (_average, 4),
    (_clock, 3),
    (_ages, 5),
)
_STEP_WEIGHTS = (8, 18, 22, 21, 17, 14)


def _math(d: Draws) -> Item:
    """One word problem. Raises ``_Infeasible`` when the drawn numbers do not fit its template."""
    steps = 1 + d.weighted(_STEP_WEIGHTS)
    scale = _SCALES[d.weighted(_SCALE_WEIGHTS)]
    # The retries stay inside the drawn length and family: otherwise long problems and chains, which
    # fail more often, would thin out.
    for _ in range(20):
        family = _FAMILIES[d.weighted([weight for _, weight in _FAMILIES])][0]
        for _ in range(40):
            work = _Work()
            try:
                question = family(d, steps, scale, work)
            except _Infeasible:
                continue
            if len(work.lines) != steps:
                continue
            gold = work.equations[-1].rpartition(" ")[2]
            answer = "\n".join([*work.lines, f"#### {gold}"])
            return Item("math", question, answer, gold, "; ".join(work.equations), steps)
    raise _Infeasible


_ARGS = ("x", "n", "a", "value", "number", "k")
_PAIRS = (("x", "y"), ("a", "b"), ("m", "n"), ("left", "right"), ("first", "second"))
_LISTS = ("xs", "items", "values", "numbers")
_TEXTS = ("s", "text", "word", "name")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _code(d: Draws) -> Item:
    """A signature with a docstring; the answer is the one-line body."""
    group = d.weighted((30, 15, 15, 20, 30))
    k = d.between(2, 99)
    small = d.between(2, 9)
    c = d.pick(_LETTERS)
    if group == 0:
        v = d.pick(_ARGS)
        args = v
        # (name, docstring, body, the number in the key or -1 where the template has none)
        rows: tuple[tuple[str, str, str, int], ...] = (
            (f"add_{k}", f"Return {v} plus {k}.", f"{v} + {k}", k),
            (f"minus_{k}", f"Return {v} minus {k}.", f"{v} - {k}", k),
            (f"times_{k}", f"Return {v} times {k}.", f"{v} * {k}", k),
            (f"div_{k}", f"Return {v} divided by {k}, rounded down.", f"{v} // {k}", k),
            (f"mod_{k}", f"Return the rest of {v} divided by {k}.", f"{v} % {k}", k),
            (f"power_{small}", f"Return {v} to the power of {small}.", f"{v} ** {small}", small),
            (f"above_{k}", f"Return True if {v} is greater than {k}.", f"{v} > {k}", k),
            (f"below_{k}", f"Return True if {v} is less than {k}.", f"{v} < {k}", k),
            (f"is_{k}", f"Return True if {v} is equal to {k}.", f"{v} == {k}", k),
            (f"by_{k}", f"Return True if {v} is divisible by {k}.", f"{v} % {k} == 0", k),
            ("is_even", f"Return True if {v} is even.", f"{v} % 2 == 0", -1),
            ("is_odd", f"Return True if {v} is odd.", f"{v} % 2 == 1", -1),
            ("square", f"Return the square of {v}.", f"{v} * {v}", -1),
            (f"scale_add_{k}", f"Return {small} times {v} plus {k}.", f"{small} * {v} + {k}", k),
            (f"at_most_{k}", f"Return {v}, but at most {k}.", f"min({v}, {k})", k),
            (f"at_least_{k}", f"Return {v}, but at least {k}.", f"max({v}, {k})", k),
            ("size", f"Return the absolute value of {v}.", f"abs({v})", -1),
        )
    elif group == 1:
        x, y = d.pick(_PAIRS)
        args = f"{x}, {y}"
        rows = (
            ("add", f"Return the sum of {x} and {y}.", f"{x} + {y}", -1),
            ("difference", f"Return {x} minus {y}.", f"{x} - {y}", -1),
            ("product", f"Return the product of {x} and {y}.", f"{x} * {y}", -1),
            ("larger", f"Return the larger of {x} and {y}.", f"max({x}, {y})", -1),
            ("smaller", f"Return the smaller of {x} and {y}.", f"min({x}, {y})", -1),
            ("average", f"Return the average of {x} and {y}.", f"({x} + {y}) / 2", -1),
            (f"sum_{k}", f"Return the sum of {x} and {y}, plus {k}.", f"{x} + {y} + {k}", k),
            (f"sum_{k}", f"Return the sum of {x} and {y}, times {k}.", f"({x} + {y}) * {k}", k),
            ("same", f"Return True if {x} equals {y}.", f"{x} == {y}", -1),
            ("distance", f"Return the distance of {x} and {y}.", f"abs({x} - {y})", -1),
        )
    elif group == 2:
        x, y = d.pick(_PAIRS)
        args = f"{x}, {y}"
        z = d.between(2, 9)
        left, left_body = f"{small} times {x}", f"{small} * {x}"
        right, right_body = f"{z} times {y}", f"{z} * {y}"
        more = f"{x} > {k} and {y} > {k}"
        rows = (
            ("mix", f"Return {left} plus {right}.", left_body + " + " + right_body, z),
            ("mix", f"Return {left} minus {right}.", left_body + " - " + right_body, z),
            ("gap", f"Return True if {x} is more than {y} plus {k}.", f"{x} > {y} + {k}", k),
            ("both", f"Return True if {x} and {y} are greater than {k}.", more, k),
            ("any", f"Return True if {x} or {y} is equal to {k}.", f"{x} == {k} or {y} == {k}", k),
        )
    elif group == 3:
        v = d.pick(_TEXTS)
        args = v
        rows = (
            ("upper", f"Return {v} in upper case.", f"{v}.upper()", -1),
            ("lower", f"Return {v} in lower case.", f"{v}.lower()", -1),
            ("reverse", f"Return {v} reversed.", f"{v}[::-1]", -1),
            ("size", f"Return the length of {v}.", f"len({v})", -1),
            (f"first_{k}", f"Return the first {k} letters of {v}.", f"{v}[:{k}]", k),
            (f"last_{k}", f"Return the last {k} letters of {v}.", f"{v}[-{k}:]", k),
            (f"repeat_{k}", f"Return {v} repeated {k} times.", f"{v} * {k}", k),
            (f"starts_{c}", f"Return True if {v} starts with '{c}'.", f"{v}.startswith('{c}')", 0),
            (f"ends_{c}", f"Return True if {v} ends with '{c}'.", f"{v}.endswith('{c}')", 0),
            (f"count_{c}", f"Return how often '{c}' is in {v}.", f"{v}.count('{c}')", 0),
            (f"drop_{c}", f"Return {v} without '{c}'.", f"{v}.replace('{c}', '')", 0),
            (f"add_{c}", f"Return {v} followed by '{c}'.", f"{v} + '{c}'", 0),
            (f"longer_{k}", f"Return True if {v} has more than {k} letters.", f"len({v}) > {k}", k),
        )
    else:
        v = d.pick(_LISTS)
        args = v
        kept = f"x for x in {v} if x"
        rows = (
            ("total", f"Return the sum of {v}.", f"sum({v})", -1),
            ("largest", f"Return the largest of {v}.", f"max({v})", -1),
            ("smallest", f"Return the smallest of {v}.", f"min({v})", -1),
            ("size", f"Return the length of {v}.", f"len({v})", -1),
            ("in_order", f"Return {v} in order.", f"sorted({v})", -1),
            ("reverse", f"Return {v} reversed.", f"{v}[::-1]", -1),
            ("first", f"Return the first of {v}.", f"{v}[0]", -1),
            ("last", f"Return the last of {v}.", f"{v}[-1]", -1),
            (f"first_{k}", f"Return the first {k} of {v}.", f"{v}[:{k}]", k),
            (f"last_{k}", f"Return the last {k} of {v}.", f"{v}[-{k}:]", k),
            (f"count_{k}", f"Return how often {k} is in {v}.", f"{v}.count({k})", k),
            (f"has_{k}", f"Return True if {k} is in {v}.", f"{k} in {v}", k),
            (f"above_{k}", f"Return those of {v} greater than {k}.", f"[{kept} > {k}]", k),
            (f"below_{k}", f"Return those of {v} less than {k}.", f"[{kept} < {k}]", k),
            (f"add_{k}", f"Return {v} with {k} added to each.", f"[x + {k} for x in {v}]", k),
            (f"times_{k}", f"Return {v} with each times {k}.", f"[x * {k} for x in {v}]", k),
            ("evens", f"Return the even ones of {v}.", f"[{kept} % 2 == 0]", -1),
            ("squares", f"Return the squares of {v}.", f"[x * x for x in {v}]", -1),
            (f"by_{k}", f"Return those of {v} divisible by {k}.", f"[{kept} % {k} == 0]", k),
            (f"sum_{k}", f"Return the sum of {v} plus {k}.", f"sum({v}) + {k}", k),
            (f"append_{k}", f"Return {v} followed by {k}.", f"{v} + [{k}]", k),
        )
    row = d.below(len(rows))
    name, doc, body, number = rows[row]
    # Names are left out of the key wherever a constant can be held out instead; a template without
    # one has only its names to tell its questions apart.
    key = f"{group}.{row} {[int(n) for n in re.findall('[0-9]+', body)]} {c if number == 0 else ''}"
    name = d.pick((name, "f", "solve", f"get_{name}"))
    if number < 0:
        key = f"{key} {name}({args})"
    question = f'def {name}({args}):\n    """{doc}"""\n'
    answer = f"    return {body}"
    return Item("code", question, answer, answer, key, 0)


_GROUPS = {
    "fruit": ("apple", "pear", "plum", "fig", "lemon", "grape", "cherry", "melon"),
    "animal": ("dog", "cat", "horse", "bird", "fish", "cow", "lion", "mouse"),
    "colour": ("red", "blue", "green", "black", "white", "yellow", "pink", "brown"),
    "tool": ("hammer", "saw", "drill", "knife", "rake", "axe", "shovel", "brush"),
    "city": ("Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Bonn"),
}
_OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("fast", "slow"),
    ("old", "new"), ("open", "closed"), ("wet", "dry"), ("full", "empty"), ("rich", "poor"),
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _options(
    d: Draws, question: str, right: str, wrong: Sequence[str], *, why: str, key: str
) -> Item:
    options = d.sample([right, *wrong], 4)
    mark = d.pick(("{}. ", "{}) ", "({}) "))
    shown = "\n".join(mark.format("ABCD"[i]) + option for i, option in enumerate(options))
    gold = "ABCD"[options.index(right)]
    key = f"{key}: {right} / {', '.join(sorted(wrong))}"
    return Item("choice", f"{question}\n{shown}", f"{why}\n#### {gold}", gold, key, 0)


def _choice(d: Draws) -> Item:
    """A question with four options; the answer states the right one and its letter."""
    which = d.weighted((16, 14, 10, 10, 16, 8, 6, 12, 10))
    if which in (0, 1, 2, 3):
        values: list[int] = []
        while len(values) < 4:
            v = d.between(2, 99)
            if v not in values:
                values.append(v)
        if which == 0:
            word = d.pick(("largest", "smallest"))
            right = max(values) if word == "largest" else min(values)
            ask, why = f"Which number is the {word}?", f"The {word} number is {right}."
        elif which == 1:
            word = d.pick(("even", "odd"))
            parity = int(word == "odd")
            right = values[0]
            values = [v + int(v % 2 == parity) for v in values]
            right = right + int(right % 2 != parity)
            _need(len({right, *values[1:]}) == 4)
            values[0] = right
            ask, why = f"Which number is {word}?", f"The {word} number is {right}."
        else:
            base = 5 if which == 2 else 10
            right = values[0] * base % 100
            _need(right > 0 and all(v % base for v in values[1:]) and right not in values[1:])
            values[0] = right
            ask = f"Which number is divisible by {base}?"
            why = f"{right} is divisible by {base}."
        wrong = [str(v) for v in values if v != right]
        return _options(d, ask, str(right), wrong, why=why, key=ask)
    if which == 4:
        group = d.pick(tuple(_GROUPS))
        right_word = d.pick(_GROUPS[group])
        others = [w for g, words in _GROUPS.items() if g != group for w in words]
        article = "an" if group == "animal" else "a"
        ask = f"Which one is {article} {group}?"
        wrong = d.sample(others, 3)
        return _options(
            d, ask, right_word, wrong, why=f"{right_word} is {article} {group}.", key=ask
        )
    if which == 5:
        words = [w for group in _GROUPS.values() for w in group]
        picked = d.sample(words, 4)
        letter = picked[0][0]
        _need(all(w[0].lower() != letter.lower() for w in picked[1:]))
        ask = f"Which word starts with {letter}?"
        return _options(
            d, ask, picked[0], picked[1:], why=f"{picked[0]} starts with {letter}.", key=ask
        )
    if which == 6:
        left, right_word = d.pick(_OPPOSITES)
        if d.chance(1, 2):
            left, right_word = right_word, left
        words = [w for pair in _OPPOSITES for w in pair if w not in (left, right_word)]
        ask = f"What is the opposite of {left}?"
        why = f"The opposite of {left} is {right_word}."
        return _options(d, ask, right_word, d.sample(words, 3), why=why, key=ask)
    if which == 7:
        a, b = d.between(2, 60), d.between(2, 39)
        op = d.pick(("+", "-"))
        _need(op == "+" or a > b + 4)
        c = a + b if op == "+" else a - b
        near = d.sample([c + j for j in (-10, -3, -2, -1, 1, 2, 3, 10) if c + j > 0], 3)
        name, thing = d.pick(NAMES), d.pick(THINGS)
        act = "buys" if op == "+" else "sells"
        ask = d.pick((f"What is {a} {op} {b}?",
                      f"{name} has {a} {thing} and {act} {b}. How many is that?"))  # fmt: skip
        why = f"{a} {op} {b} = {c}."
        return _options(d, ask, str(c), [str(v) for v in near], why=why, key=f"{a} {op} {b}")
    day = d.below(7)
    step = d.pick((1, -1))
    right_day = _DAYS[(day + step) % 7]
    word = "after" if step == 1 else "before"
    wrong_days = [w for w in _DAYS if w not in (right_day, _DAYS[day])]
    ask = f"Which day comes right {word} {_DAYS[day]}?"
    why = f"{right_day} comes right {word} {_DAYS[day]}."
    return _options(d, ask, right_day, d.sample(wrong_days, 3), why=why, key=ask)


def _lookup(d: Draws) -> Item:
    """A small table or list in the question; the answer is read off it."""
    which = d.below(4)
    count = d.between(3, 6)
    numeric = which != 1
    if which == 0:
        names: list[str] = [*d.sample([w for g in ("fruit", "tool") for w in _GROUPS[g]], count)]
        title, unit, head = "Prices", "$", ("thing", "price")
    elif which == 1:
        names = d.sample(NAMES, count)
        title, unit, head = "Cities", "", ("name", "city")
    elif which == 2:
        names = d.sample(NAMES, count)
        title, unit, head = "Ages", "", ("name", "age")
    else:
        names = d.sample(THINGS, count)
        title, unit, head = "Stock", "", ("thing", "count")
    values: list[str] = []
    pool = d.sample(_GROUPS["city"], count) if not numeric else []
    while len(values) < count:
        value = str(d.between(2, 99)) if numeric else pool[len(values)]
        if value not in values:
            values.append(value)
    pairs = list(zip(names, values, strict=True))
    style = d.below(3)
    if style == 0:
        body = "\n".join(f"{n} | {unit}{v}" for n, v in pairs)
        table = f"{head[0]} | {head[1]}\n{body}"
    elif style == 1:
        table = f"{title}: " + ", ".join(f"{n} {unit}{v}" for n, v in pairs) + "."
    else:
        table = f"{title}:\n" + "\n".join(f"- {n}: {unit}{v}" for n, v in pairs)
    ask = d.weighted((6, 3, 3 if numeric else 0))
    name, value = d.pick(pairs)
    if ask == 0:
        question = f"What is the {head[1]} of {name}?"
        why, gold = f"The {head[1]} of {name} is {unit}{value}.", value
    elif ask == 1:
        question = f"Which {head[0]} has the {head[1]} {unit}{value}?"
        why, gold = f"{name} has the {head[1]} {unit}{value}.", name
    else:
        word = d.pick(("highest", "lowest"))
        chosen = max if word == "highest" else min
        name, value = chosen(pairs, key=lambda pair: int(pair[1]))
        question = f"Which {head[0]} has the {word} {head[1]}?"
        why, gold = f"{name} has the {word} {head[1]}, {unit}{value}.", name
    key = f"{which} {sorted(pairs)} {question}"
    return Item("lookup", f"{table}\n{question}", f"{why}\n#### {gold}", gold, key, 0)


_SORTS: dict[str, tuple[str, ...]] = {
    **_GROUPS,
    "vegetable": ("carrot", "potato", "onion", "bean", "pea", "leek", "turnip", "cabbage"),
    "garment": ("shirt", "coat", "hat", "sock", "shoe", "scarf", "glove", "skirt"),
    "vehicle": ("car", "bus", "train", "truck", "boat", "bike", "plane", "tram"),
    "instrument": ("piano", "violin", "flute", "drum", "guitar", "harp", "trumpet", "cello"),
    "job": ("baker", "doctor", "teacher", "farmer", "pilot", "tailor", "nurse", "judge"),
}
_USES: dict[str, tuple[str, ...]] = {
    "eat": (*_SORTS["fruit"], *_SORTS["vegetable"]),
    "wear": _SORTS["garment"],
    "ride": _SORTS["vehicle"],
    "play": _SORTS["instrument"],
}
_MOVES_OF: dict[str, tuple[str, ...]] = {
    "fly": ("eagle", "bee", "owl", "crow", "hawk", "bat", "moth", "wasp"),
    "swim": ("fish", "shark", "whale", "trout", "squid", "seal", "cod", "eel"),
    "run": ("dog", "cat", "horse", "lion", "wolf", "mouse", "deer", "goat"),
}
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class _Facts:
    """A family of ``mc`` questions: ``ask`` for the second of a pair, given the first.

    ``say`` states the fact and ends with the second.
    """

    ask: tuple[str, ...]
    say: str
    pairs: tuple[tuple[str, str], ...]


_FACTS = (
    _Facts(
        ("What is the opposite of {a}?", "Which word means the opposite of {a}?"),
        "The opposite of {a} is {b}",
        tuple(pair for a, b in (
            *_OPPOSITES, ("long", "short"), ("hard", "soft"), ("heavy", "light"), ("good", "bad"),
            ("early", "late"), ("clean", "dirty"), ("loud", "quiet"), ("strong", "weak"),
        ) for pair in ((a, b), (b, a))),
    ),
    _Facts(
        ("What is the plural of {a}?", "What do you call more than one {a}?"),
        "The plural of {a} is {b}",
        (("mouse", "mice"), ("foot", "feet"), ("tooth", "teeth"), ("goose", "geese"),
         ("man", "men"), ("child", "children"), ("ox", "oxen"), ("leaf", "leaves"),
         ("knife", "knives"), ("wolf", "wolves"), ("city", "cities"), ("box", "boxes"),
         ("baby", "babies"), ("loaf", "loaves")),
    ),
    _Facts(
        ("What sound does a {a} make?", "What does a {a} do?"),
        "A {a} can {b}",
        (("dog", "bark"), ("cat", "meow"), ("cow", "moo"), ("duck", "quack"), ("lion", "roar"),
         ("sheep", "bleat"), ("pig", "grunt"), ("bee", "buzz"), ("snake", "hiss"),
         ("horse", "neigh"), ("wolf", "howl"), ("frog", "croak")),
    ),
    _Facts(
        ("What is a young {a} called?", "What grows up to be a {a}?"),
        "A young {a} is a {b}",
        (("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("sheep", "lamb"),
         ("horse", "foal"), ("bear", "cub"), ("frog", "tadpole"), ("goat", "kid"),
         ("duck", "duckling"), ("deer", "fawn"), ("swan", "cygnet"), ("pig", "piglet")),
    ),
    _Facts(
        ("What is the past of {a}?", "Today I {a}. What is the word for yesterday?"),
        "The past of {a} is {b}",
        (("go", "went"), ("see", "saw"), ("eat", "ate"), ("run", "ran"), ("take", "took"),
         ("give", "gave"), ("come", "came"), ("write", "wrote"), ("sing", "sang"),
         ("swim", "swam"), ("buy", "bought"), ("think", "thought"), ("fly", "flew"),
         ("sleep", "slept")),
    ),
    _Facts(
        ("What is the capital of {a}?", "Which city is the capital of {a}?"),
        "The capital of {a} is {b}",
        (("Italy", "Rome"), ("France", "Paris"), ("Norway", "Oslo"), ("Peru", "Lima"),
         ("Egypt", "Cairo"), ("India", "Delhi"), ("Japan", "Tokyo"), ("Spain", "Madrid"),
         ("Greece", "Athens"), ("Cuba", "Havana"), ("Austria", "Vienna"), ("Kenya", "Nairobi"),
         ("Chile", "Santiago"), ("Poland", "Warsaw")),
    ),
    _Facts(
        ("Where does a {a} live?", "What is the home of a {a}?"),
        "A {a} lives in a {b}",
        (("bee", "hive"), ("bird", "nest"), ("dog", "kennel"), ("spider", "web"),
         ("fox", "den"), ("horse", "stable"), ("pig", "sty"), ("fish", "pond"),
         ("rabbit", "burrow"), ("camel", "desert")),
    ),
    _Facts(
        ("Who works with {a}?", "Whose work needs {a}?"),
        "Work with {a} is for a {b}",
        (("bread", "baker"), ("cloth", "tailor"), ("planes", "pilot"), ("fields", "farmer"),
         ("pupils", "teacher"), ("meat", "butcher"), ("wood", "carpenter"), ("paint", "artist"),
         ("laws", "judge"), ("stones", "mason"), ("hair", "barber"), ("ships", "sailor")),
    ),
    _Facts(
        ("Which day comes right after {a}?", "If today is {a}, which day is tomorrow?"),
        "Right after {a} comes {b}",
        tuple((day, _DAYS[(i + 1) % 7]) for i, day in enumerate(_DAYS)),
    ),
    _Facts(
        ("Which day comes right before {a}?", "If today is {a}, which day was yesterday?"),
        "Right before {a} comes {b}",
        tuple((day, _DAYS[i - 1]) for i, day in enumerate(_DAYS)),
    ),
    _Facts(
        ("Which month comes right after {a}?", "If it is {a} now, which month is next?"),
        "Right after {a} comes {b}",
        tuple((month, _MONTHS[(i + 1) % 12]) for i, month in enumerate(_MONTHS)),
    ),
    _Facts(
        ("Which month comes right before {a}?", "If it is {a} now, which month was the last?"),
        "Right before {a} comes {b}",
        tuple((month, _MONTHS[i - 1]) for i, month in enumerate(_MONTHS)),
    ),
)  # fmt: skip


def _labelled(
    d: Draws, stem: str, right: str, wrong: Sequence[str], *, told: Callable[[str], str], say: str,
    key: str,
) -> Item:  # fmt: skip
    """An ``mc`` item. Its answer tells what each option is, letter last, then what is asked for.

    The line before the last, ``say``, ends as ``told`` does for the right option, so its letter is
    a plain copy of what followed there. A model of this size can learn that; naming the letter
    outright (kind ``choice``) or judging options one by one it does not.
    """
    options = d.sample([right, *wrong], 4)
    gold = "ABCD"[options.index(right)]
    pairs = list(zip("ABCD", options, strict=True))
    lines = [f"{told(option)} {letter}" for letter, option in pairs]
    shown = "\n".join(f"{letter}. {option}" for letter, option in pairs)
    key = f"{key}: {right} / {', '.join(sorted(wrong))}"
    answer = "\n".join([*lines, f"{say} {gold}", f"#### {gold}"])
    return Item("mc", f"{stem}\n{shown}", answer, gold, key, 0)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _holder(groups: dict[str, tuple[str, ...]], word: str) -> str:
    return next(name for name, words in groups.items() if word in words)


def _mc_words(d: Draws, which: int) -> Item:
    """Which word is of a sort, has a use, moves in a way, or starts with a letter."""
    if which == 3:
        words = d.sample([w for group in _SORTS.values() for w in group], 4)
        first = words[0][0].lower()
        _need(all(w[0].lower() != first for w in words[1:]))
        stem = d.pick((f"Which word starts with {first}?", f"Which word has {first} as its first?"))
        return _labelled(d, stem, words[0], words[1:], told=lambda w: f"{w}, {w[0].lower()}",
                         say=first, key=first)  # fmt: skip
    groups = (_SORTS, _USES, _MOVES_OF)[which]
    name = d.pick(tuple(groups))
    right = d.pick(groups[name])
    wrong = d.sample([w for other, words in groups.items() if other != name for w in words], 3)
    form = ("{}", "to {}", "can {}")[which]
    asks = (
        ("Which one is {}?", "Which word names {}?"),
        ("Which one can you {}?", "What would you {}?"),
        ("Which animal is best known to {}?", "Which one likes to {}?"),
    )[which]
    shown = {n: _article(n) if which == 0 else n for n in groups}
    return _labelled(
        d, d.pick(asks).format(shown[name]), right, wrong, key=name,
        told=lambda w: f"{w} {form.format(shown[_holder(groups, w)])}",
        say=form.format(shown[name]),
    )  # fmt: skip


def _mc_numbers(d: Draws, which: int) -> Item:
    """Which number is even, ends in a digit, lies above a bound, is a sum, or is the largest."""
    values = [d.between(2, 99) for _ in range(4)]
    _need(len(set(values)) == 4)
    right, rest = values[0], values[1:]
    say = ""
    told: Callable[[str], str] = str
    if which == 0:
        word = ("even", "odd")[right % 2]
        rest = [v + 1 - (v - right) % 2 for v in rest]
        _need(len({right, *rest}) == 4)
        stem, key = d.pick((f"Which number is {word}?", f"Find the {word} number.")), word
        told, say = lambda t: f"{t} {('even', 'odd')[int(t) % 2]}", word
    elif which == 1:
        base = d.pick((5, 10))
        right = base * d.between(1, 95 // base)
        rest = [v + int(v % base == 0) for v in rest]
        _need(len(set(rest)) == 3)
        stem, key = f"Which number is divisible by {base}?", f"by {base}"
        told, say = lambda t: f"{t} {'not' if int(t) % base else 'fits'}", "fits"
    elif which == 2:
        bound = d.between(10, 90)
        low = [d.between(2, bound - 1) for _ in rest]
        high = [d.between(bound + 1, 99) for _ in rest]
        up = d.chance(1, 2)
        right, rest = (high[0], low) if up else (low[0], high)
        _need(len(set(rest)) == 3)
        word = "greater" if up else "less"
        stem, key = f"Which number is {word} than {bound}?", f"{word} {bound}"
        told, say = lambda t: f"{t} {'greater' if int(t) > bound else 'less'}", word
    elif which == 3:
        a, b = d.between(2, 60), d.between(2, 39)
        op = d.pick(("+", "-"))
        _need(op == "+" or a > b + 4)
        right = a + b if op == "+" else a - b
        rest = d.sample([right + j for j in (-10, -3, -2, -1, 1, 2, 3, 10) if right + j > 0], 3)
        stem, key, say = f"What is {a} {op} {b}?", f"{a} {op} {b}", f"{a} {op} {b} = {right}"
    else:
        word = ("largest", "smallest")[which - 4]
        right = max(values) if word == "largest" else min(values)
        rest = [v for v in values if v != right]
        stem, key = d.pick((f"Which number is the {word}?", f"Find the {word} number.")), word
        say = f"The {word} number is {right}"
    return _labelled(d, stem, str(right), [str(v) for v in rest], told=told, say=say, key=key)


def _mc(d: Draws) -> Item:
    """A question of knowledge as in ARC: the stem, then a line ``A. text`` for each option."""
    which = d.weighted((14, 6, 6, 8, 7, 5, 7, 8, 4, 4, 8, 5, 5, 5, 6, 7, 4, 5, 3, 3, 4, 4))
    if which < 4:
        return _mc_words(d, which)
    if which < 10:
        return _mc_numbers(d, which - 4)
    facts = _FACTS[which - 10]
    given, right = d.pick(facts.pairs)
    pool = [b for _, b in facts.pairs if b not in (given, right)]
    if facts.say.startswith("The plural"):
        pool.append(f"{given}s")
    stem = _fill(d.pick(facts.ask), a=given)
    say = _fill(facts.say, a=given, b=right)
    return _labelled(d, stem, right, d.sample(pool, 3), told=str, say=say, key=say)


@dataclass(frozen=True)
class _Trait:
    """A family of ``traits`` questions: wordings, and for each property the words that have it."""

    ask: tuple[str, ...]
    words: dict[str, tuple[str, ...]]


_PICKED_SORTS = ("fruit", "tool", "animal", "colour", "garment", "vehicle")
_TRAITS = (
    _Trait(("Which one is a kind of {}?", "Which word names a {}?"),
           {sort: _SORTS[sort] for sort in _PICKED_SORTS}),
    _Trait(("Which one can you {}?", "What would you {}?"), _USES),
    _Trait(("Which animal is best known to {}?", "Which one likes to {}?"), _MOVES_OF),
    _Trait(("Which animal has {} legs?", "Which one walks on {} legs?"), {
        "two": ("bird", "duck", "owl", "hen", "swan", "crow", "hawk", "goose"),
        "four": ("dog", "cat", "horse", "cow", "lion", "goat", "sheep", "pig"),
        "six": ("ant", "bee", "moth", "wasp", "beetle", "flea", "gnat", "cricket"),
    }),
    _Trait(("Which city is in {}?", "Which of these cities lies in {}?"), {
        "Europe": ("Rome", "Paris", "Oslo", "Bonn", "Madrid", "Vienna", "Athens", "Warsaw"),
        "Asia": ("Delhi", "Tokyo", "Seoul", "Hanoi", "Manila", "Kabul", "Amman", "Dhaka"),
        "Africa": ("Cairo", "Nairobi", "Tunis", "Accra", "Dakar", "Lagos", "Rabat", "Harare"),
        "America": ("Lima", "Havana", "Santiago", "Quito", "Boston", "Bogota", "Caracas",
                    "Ottawa"),
    }),
    _Trait(("Which month is in {} in the north?", "Which month belongs to {} in the north?"), {
        "winter": ("December", "January", "February"),
        "spring": ("March", "April", "May"),
        "summer": ("June", "July", "August"),
        "autumn": ("September", "October", "November"),
    }),
    _Trait(("What is mostly made of {}?", "Which one do we make of {}?"), {
        "wood": ("log", "plank", "desk", "pencil", "fence", "crate", "oar", "mast"),
        "metal": ("nail", "coin", "key", "spoon", "anvil", "chain", "bell", "wire"),
        "glass": ("window", "bottle", "mirror", "lens", "jar", "vase", "pane", "bulb"),
        "cloth": ("shirt", "sock", "scarf", "flag", "towel", "curtain", "sheet", "skirt"),
    }),
    _Trait(("Which one is a {}?", "Which of these is a {} in a room?"), {
        "solid": ("stone", "brick", "salt", "iron", "bone", "coal", "sand", "rock"),
        "liquid": ("water", "milk", "oil", "juice", "tea", "rain", "ink", "wine"),
        "gas": ("air", "steam", "oxygen", "helium", "methane", "neon", "argon", "nitrogen"),
    }),
    _Trait(("Which one is {}?", "Which of these is very {}?"), {
        "hot": ("fire", "oven", "lava", "sun", "flame", "stove", "kettle", "furnace"),
        "cold": ("ice", "snow", "frost", "glacier", "freezer", "hail", "sleet", "iceberg"),
    }),
    _Trait(("Which word is {}?", "Which of these words is {}?"), {
        "singular": ("mouse", "foot", "tooth", "goose", "man", "child", "ox", "leaf"),
        "plural": ("mice", "feet", "teeth", "geese", "men", "children", "oxen", "leaves"),
    }),
    _Trait(("Which verb is in the {}?", "Which of these words tells of the {}?"), {
        "past": ("went", "saw", "ate", "ran", "took", "gave", "wrote", "sang"),
        "present": ("go", "see", "eat", "run", "take", "give", "write", "sing"),
    }),
    _Trait(("Which one belongs to a {}?", "What would you find at a {}?"), {
        "kitchen": ("oven", "pan", "fork", "kettle", "stove", "cup", "plate", "ladle"),
        "school": ("pupil", "chalk", "teacher", "lesson", "desk", "grade", "exam", "class"),
        "farm": ("barn", "plough", "tractor", "hay", "cow", "hen", "field", "crop"),
        "harbour": ("ship", "anchor", "sailor", "crane", "pier", "boat", "dock", "tug"),
    }),
)  # fmt: skip


def _trait_of_numbers(d: Draws) -> tuple[str, str, dict[str, list[str]]]:
    """A question on numbers, the property it asks for, and numbers with and without it."""
    which = d.below(3)
    if which == 0:
        asked = d.pick(("even", "odd"))
        sets = {("even", "odd")[i]: [str(v) for v in range(2 + i, 100, 2)] for i in (0, 1)}
        return d.pick((f"Which number is {asked}?", f"Find the {asked} number.")), asked, sets
    if which == 1:
        base = d.pick((5, 10))
        fits = [str(v) for v in range(base, 100, base)]
        rest = [str(v) for v in range(2, 100) if v % base]
        stem = d.pick((f"Which number is divisible by {base}?", f"Which one can {base} divide?"))
        return stem, "fits", {"fits": fits, "not": rest}
    bound = d.between(10, 90)
    asked = d.pick(("greater", "less"))
    sets = {
        "less": [str(v) for v in range(2, bound)],
        "greater": [str(v) for v in range(bound + 1, 100)],
    }
    stem = d.pick((f"Which number is {asked} than {bound}?", f"Find one {asked} than {bound}."))
    return stem, asked, sets


def _traits(d: Draws) -> Item:
    """Which of four words or numbers has a property.

    The answer goes through the options, each with its letter, its property and its letter again,
    and then names the property asked for, so that the letter is what followed it above. There are
    few properties, which is what lets models of this size bind them to letters; matching any word
    at all (kind ``mc``) or naming the letter outright (kind ``choice``) they hardly learn.
    """
    which = d.weighted((*(6 for _ in _TRAITS), 24))
    sets: dict[str, Sequence[str]]
    if which < len(_TRAITS):
        trait = _TRAITS[which]
        asked = d.pick(tuple(trait.words))
        sets = {**trait.words}
        stem = d.pick(trait.ask).format(asked)
        key = f"{which} {asked}"
    else:
        stem, asked, numbers = _trait_of_numbers(d)
        sets = {**numbers}
        key = re.sub(r"\D+", " ", stem) + asked
    right = d.pick(sets[asked])
    wrong = d.sample([w for name, words in sets.items() if name != asked for w in words], 3)
    options = d.sample([right, *wrong], 4)
    gold = "ABCD"[options.index(right)]
    pairs = list(zip("ABCD", options, strict=True))
    shown = "\n".join(f"{letter}. {option}" for letter, option in pairs)
    told = [
        f"{letter}. {option}, {next(n for n, words in sets.items() if option in words)} {letter}"
        for letter, option in pairs
    ]
    answer = "\n".join([*told, f"So {asked} {gold}", f"#### {gold}"])
    key = f"{key}: {right} / {', '.join(sorted(wrong))}"
    return Item("traits", f"{stem}\n{shown}", answer, gold, key, 0)


_MAKERS: dict[Kind, Callable[[Draws], Item]] = {
    "math": _math,
    "code": _code,
    "choice": _choice,
    "lookup": _lookup,
    "mc": _mc,
    "traits": _traits,
}


def split_of(item: Item) -> Split:
    """The split that ``item`` belongs to: one in ``TEST_SHARE`` of the keys is for tests."""
    digest = hashlib.sha256(f"{item.kind}\x1f{item.key}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "little") % TEST_SHARE == 0 else "train"


def stream(kind: Kind, split: Split, seed: int) -> Iterator[Item]:
    """Endless items of one kind and split, no question twice.

    The same arguments give the same items on every platform and Python version. Kinds other than
    ``math`` have finitely many questions: after 20,000 draws in a row without a new one the stream
    ends.
    """
    draws = Draws(seed, kind, split)
    seen: set[str] = set()
    misses = 0
    while misses < 20_000:
        misses += 1
        try:
            item = _MAKERS[kind](draws)
        except _Infeasible:
            continue
        if split_of(item) != split or item.question in seen:
            continue
        seen.add(item.question)
        misses = 0
        yield item


def take(kind: Kind, split: Split, count: int, seed: int) -> list[Item]:
    """The first ``count`` items of :func:`stream`. ValueError if the kind has fewer questions."""
    items = []
    source = stream(kind, split, seed)
    for item in source:
        items.append(item)
        if len(items) == count:
            return items
    raise ValueError(f"only {len(items)} different {split} questions of kind {kind!r}, not {count}")


def final_answer(text: str) -> str | None:
    """What follows the last ``####`` of ``text`` on its line, or None if there is none."""
    _, mark, tail = text.rpartition("####")
    found = tail.strip().split("\n")[0].strip()
    return found if mark and found else None


def tinygsm_items() -> list[Item]:
    """The 500 held-out ``math`` items of the shipped test set, in order."""
    return take("math", "test", TINYGSM_ROWS, TINYGSM_SEED)


def tinycode_items() -> list[Item]:
    """The 200 held-out ``code`` items of the shipped test set, in order."""
    return take("code", "test", TINYCODE_ROWS, TINYCODE_SEED)


def tinymc_items() -> list[Item]:
    """The 300 held-out ``traits`` items of the shipped test set, in order."""
    return take("traits", "test", TINYMC_ROWS, TINYMC_SEED)


def _inputs(item: Item) -> list[str]:
    """Argument lists, as Python source, on which a ``code`` item is tested.

    They surround the constants of the reference, where a wrong constant or comparison shows, and
    hold the edges: zero, negative, empty, repeated, and longer than any constant.
    """
    names = re.findall(r"\((.*)\):", item.question)[0].split(", ")
    constants = sorted({int(c) for c in re.findall(r"\d+", item.answer)})
    around = sorted({c + j for c in constants for j in (-1, 0, 1)} | {0, 1, 2, 7, 10, 120, -3})
    if names[0] in _LISTS:
        near = constants[-1] if constants else 4
        return ["[5]", "[3, 1, 2]", "[7, -4, 0, 7, 12, -9]", f"{around}", f"{[near] * 3}",
                f"{[2 * near, near + 1, near, near - 1, -near]}", "list(range(-5, 125))",
                "[]"]  # fmt: skip
    if names[0] in _TEXTS:
        letters = re.findall(r"'(.)'", item.answer)
        mark = letters[0] if letters else "q"
        other = "z" if mark != "z" else "y"
        texts = ["", mark, f"{other}{mark}", f"{mark}{mark}{other}{mark}", f"{mark.upper()}x",
                 other, "Hello World", "abc, Abc"]  # fmt: skip
        lengths = [f"{'ab'!r} * {c} + {'c'!r}" for c in constants]
        fixed = [f"{'x'!r} * {c + j}" for c in constants for j in (0, 1)]
        return [*map(repr, texts), "'abcdefghijklm' * 10", *lengths, *fixed]
    if len(names) == 1:
        return [str(v) for v in around]
    lone = [c for c in constants if c > 1] or [5]
    k = lone[-1]
    pairs = ((0, 0), (1, 0), (0, 1), (3, 8), (8, 3), (-4, 6), (k, 3), (3, k), (k + 1, k + 1),
             (k + 1, k), (k, k + 1), (k + 4, 3), (k + 3, 3), (200, 7), (7, 200),
             (-k, -9))  # fmt: skip
    return [f"{a}, {b}" for a, b in pairs]


def tinycode_row(index: int, item: Item) -> dict[str, str]:
    """``item`` in HumanEval's schema; the asserts hold what the reference really returns."""
    body = f"{item.answer}\n"
    space: dict[str, Callable[..., object]] = {}
    exec(item.question + body, space)
    entry = item.question[len("def ") : item.question.index("(")]
    asserts: list[str] = []
    for arguments in dict.fromkeys(_inputs(item)):
        try:
            value = eval(f"candidate({arguments})", {"candidate": space[entry]})
        except (IndexError, ValueError):  # the first of nothing, the largest of nothing
            continue
        asserts.append(f"    assert candidate({arguments}) == {value!r}\n")
    return {
        "task_id": f"tinycode/{index}",
        "prompt": item.question,
        "canonical_solution": body,
        "test": "def check(candidate):\n" + "".join(asserts),
        "entry_point": entry,
    }


def tinymc_row(index: int, item: Item) -> dict[str, object]:
    """``item`` in ARC's schema."""
    stem, *lines = item.question.split("\n")
    return {
        "id": f"tinymc-{index}",
        "question": stem,
        "choices": {
            "text": [line.partition(". ")[2] for line in lines],
            "label": [line.partition(". ")[0] for line in lines],
        },
        "answerKey": item.gold,
    }


def _json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode("ascii")


def tinygsm_bytes() -> bytes:
    """The shipped test set: JSON lines with ``question`` and ``answer``, as in GSM8K."""
    return _json_lines({"question": i.question, "answer": i.answer} for i in tinygsm_items())


def tinycode_bytes() -> bytes:
    """The shipped test set of functions: JSON lines with the fields of HumanEval."""
    return _json_lines(tinycode_row(i, item) for i, item in enumerate(tinycode_items()))


def tinymc_bytes() -> bytes:
    """The shipped multiple-choice test set: JSON lines with the fields of ARC."""
    return _json_lines(tinymc_row(i, item) for i, item in enumerate(tinymc_items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write the shipped test sets, or print a few items."""
    parser = argparse.ArgumentParser(prog="python -m dlmom_rs.zoo.problems", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the shipped test sets")
    parser.add_argument("--out", type=Path, default=DATA, help="folder that --write writes to")
    parser.add_argument("--show", choices=KINDS, help="print items of this kind instead")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.show:
        for item in take(args.show, args.split, args.count, args.seed):
            print(f"{item.question}\n--\n{item.answer}\n")
    if args.write:
        args.out.mkdir(parents=True, exist_ok=True)
        for shipped, data in (
            (TINYGSM_PATH, tinygsm_bytes()),
            (TINYCODE_PATH, tinycode_bytes()),
            (TINYMC_PATH, tinymc_bytes()),
        ):
            target = args.out / shipped.name
            target.write_bytes(data)
            rows = data.count(b"\n")
            print(f"wrote {rows} rows to {target}")
    if not (args.show or args.write):
        parser.error("nothing to do: give --write or --show KIND")


if __name__ == "__main__":
    main()
