"""Words beside numbers: units, words that say another number, numbers in words."""

from __future__ import annotations

import collections
import re

_MEANING = """
squared cubed times plus minus over half halves third thirds quarter quarters dozen hundred thousand million billion
trillion least most not or and more less than about by to of double twice triple between from under above below
factorial root power modulo mod divided multiplied percent at up no none infinitely many approximately negative
positive even odd except if unless otherwise pairs is are isn't wrong incorrect
"""
MEANING = frozenset(_MEANING.split())  # 5 squared is not 5
_UNITS = """
cm: cm centimeter centimetre centimeters centimetres cms
m: m meter metre meters metres
mm: mm millimeter millimetre millimeters millimetres
km: km kilometer kilometre kilometers kilometres kms
in: in inch inches
ft: ft foot feet
yd: yd yard yards
mi: mi mile miles
s: s sec secs second seconds
min: min mins minute minutes
h: h hr hrs hour hours
day: day days
week: week weeks
month: month months
year: year years yr yrs
kg: kg kilogram kilograms kgs
g: g gram grams
mg: mg milligram milligrams
lb: lb lbs pound pounds
oz: oz ounce ounces
l: l liter litre liters litres
ml: ml milliliter millilitre milliliters millilitres
deg: degree degrees deg
rad: radian radians rad
$: dollar dollars usd
cent: cent cents
mi/h: mph
N: n newton newtons
J: j joule joules
W: w
V: v
Pa: pa
Hz: hz
kJ: kj
kW: kw
eV: ev
K: k
C: c
F: f
mol: mol
ohm: ohm
"""
# Each name of a unit → its sign. Two that are known and differ contradict each other; nouns (5 apples) do not count.
UNITS = {name: line.partition(":")[0] for line in _UNITS.split("\n") for name in line.partition(":")[2].split()}
_IN_UNIT = re.compile(r"(/|\bper\b)|\b(squared?|sq|cubic)\b|([A-Za-z$]+) ?\^? ?\{? ?(-?\d)?")


def unit_of(words: str) -> str:
    """A unit in one spelling, m/s^2 and m s^{-2} alike; "": there is a word in it that is no known unit."""
    powers: collections.Counter[str] = collections.Counter()
    sign, next_power = 1, 1
    for per, area, name, power in _IN_UNIT.findall(words):
        if per:
            sign = -1
        elif area:
            next_power = 3 if area == "cubic" else 2
        else:
            unit = UNITS.get(name.lower() if len(name) > 1 else name, UNITS.get(name.lower(), ""))
            if not unit:
                return ""
            above, _, below = unit.partition("/")
            powers[above] += sign * next_power * int(power or 1)
            powers[below] -= sign
            next_power = 1
    return " ".join(f"{name}{power}" for name, power in sorted(powers.items()) if name)


_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
"""
_LARGER = {
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
    "hundred": 100,
}
LARGE = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBER_WORDS = (
    {word: number for number, word in enumerate(_NUMBERS.split())}
    | _LARGER
    | {
        "thousand": 1000,
        "million": 1_000_000,
    }
)
