"""The first pocket testbed, a fixture of the tests: its model answers several times as fast as the default one's."""

from functools import partial

from grip_hf.pocket import load_pocket
from grip_hf.pocket import make_scene as make_any_scene
from grip_hf.pocket.examples import OnePerScene as AnyOnePerScene
from grip_hf.pocket.examples import PocketExamples as AnyPocketExamples
from grip_hf.pocket.testbeds import POCKET

WEIGHTS = POCKET.weights
FIRST = ("--testbed", POCKET.name)  # for commands
load_pocket_llava = partial(load_pocket, POCKET.name)
make_scene = partial(make_any_scene, testbed=POCKET.name)
PocketExamples = partial(AnyPocketExamples, testbed=POCKET.name)
OnePerScene = partial(AnyOnePerScene, testbed=POCKET.name)
