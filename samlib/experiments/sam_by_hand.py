"""00: the identities behind SAM, and one theorem by simulation, in float64. Decided exactly, on any machine."""

from samlib.experiments import PROFILES, Arm
from samlib.spec import CheckSpec

TITLE = "What does one step of SAM do?"
PUBLISHED_SCALE = frozenset(PROFILES)  # identities hold at any scale

NORMS = ("1.5", "2", "4", "inf")
EXACT_SEEDS = tuple(range(5))
TOY_SEEDS = tuple(range(20))
TOY_METHODS = ("sgd", "sam", "msam")

DECIDES = {
    "foret-eq2-dual-norm": {"quick": tuple(f"p={p}" for p in NORMS)},
    "behdin-msam-m1-is-sam": {"quick": ("one_shard",)},
    "behdin-lemma34-effective-jacobian": {"quick": ("quadratic",)},
    "behdin-theorem32-toy": {"quick": ("toy",)},
}


def arms(profile: str) -> tuple[Arm, ...]:
    if profile != "quick":  # the checks need no data set and no GPU: one profile holds them
        return ()
    return (
        *(Arm("closed_form", f"p={p}", CheckSpec("dual_norm", (("p", p),)), EXACT_SEEDS) for p in NORMS),
        Arm("msam", "one_shard", CheckSpec("one_shard"), EXACT_SEEDS),
        Arm("jacobian", "quadratic", CheckSpec("effective_jacobian"), EXACT_SEEDS),
        *(Arm(name, "toy", CheckSpec("edge_of_stability", (("method", name),)), TOY_SEEDS) for name in TOY_METHODS),
    )
