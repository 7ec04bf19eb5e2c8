"""Augmentation: operation by operation torchvision's, whole batches against a loop over images, laws by chi-square."""

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import functional
from torchvision.transforms.autoaugment import _apply_op

from samlib import augment
from samlib.augment import ACTIONS, POLICY, Action, Augmentation
from samlib.errors import InputError

TORCHVISION = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
MEAN, SD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
ALL = Augmentation(autoaugment=True, flip=True, crop="reflect", cutout=16, mixup=0.2)
ONE_BY_ONE = [
    Augmentation(autoaugment=True),
    Augmentation(flip=True),
    Augmentation(crop="zero"),
    Augmentation(crop="reflect"),
    Augmentation(cutout=16),
    Augmentation(mixup=0.2),
]
NEVER = 1e-3  # no p value below this: the seeds are fixed, so a test that passes goes on passing


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, size=(32, 32), seed=0):
    return torch.randint(256, (n, 3, *size), generator=generator(seed), dtype=torch.uint8)


def pictures(size=(32, 32)):
    """Where operations go wrong: noise, few values, one value, ramps, one bright pixel, one channel black."""
    height, width = size
    images = noise(10, size)
    images[1] = images[1] // 8 + 40
    images[2] = 77
    images[3] = (torch.arange(width) * 255 // (width - 1)).to(torch.uint8)
    images[4] = (images[4] > 128) * 200
    images[5] = images[5] // 32
    images[6, 0] = 0
    images[7] = (torch.arange(height * width) % 251).view(size).to(torch.uint8)
    images[8] = 0
    images[8, :, 3, 4] = 255
    images[9] = 255
    return images


def amount(action, size):
    """Torchvision's magnitude of an action."""
    space = TORCHVISION._augmentation_space(10, size)
    magnitudes = space[action.operation][0] if action.operation in space else torch.zeros(())
    return action.sign * float(magnitudes[action.magnitude] if magnitudes.ndim else magnitudes)


def act(image, action):
    """Torchvision's operation on one image, a tensor or one of PIL."""
    size = tuple(functional.get_dimensions(image)[1:])
    nearest = transforms.InterpolationMode.NEAREST
    return _apply_op(image, action.operation, amount(action, size), interpolation=nearest, fill=None)


def same_for(n, **fields):
    """Draws for n images: the fields repeated, all others off."""
    off = dict.fromkeys(["actions", "flip", "corner", "centre", "partner", "share"])
    return augment.Draws(**off | {name: torch.tensor(value).repeat(n, 1) for name, value in fields.items()})


def pixels_after(images, draws, augmentation):
    """What `apply` made of the pixels, 0 to 255."""
    return augmentation.apply(images, draws, torch.zeros(3), torch.ones(3)) * 255


# ---------------------------------------------------------------------------------------------- AutoAugment


def test_the_policy_is_torchvisions():
    theirs = [[(name, chance, magnitude or 0) for name, chance, magnitude in pair] for pair in TORCHVISION.policies]
    assert [list(pair) for pair in POLICY] == theirs


def test_the_actions_are_all_that_the_policy_can_do():
    space = TORCHVISION._augmentation_space(10, (32, 32))
    expected = {
        Action(name, magnitude or 0, sign if space[name][1] else 1)
        for pair in TORCHVISION.policies
        for name, _, magnitude in pair
        for sign in (-1, 1)
    }
    assert set(ACTIONS) == expected | {Action("Identity")}
    assert len(ACTIONS) == len(set(ACTIONS)) == 55
    assert ACTIONS[0] == Action("Identity")


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("size", [(32, 32), (20, 31)], ids=["32x32", "20x31"])
@pytest.mark.parametrize("place", range(len(ACTIONS)), ids=[f"{a.operation}{a.sign * a.magnitude}" for a in ACTIONS])
def test_an_action_in_either_round_is_torchvisions_operation(place, size, slot):
    images = pictures(size)
    actions = [place, 0] if slot == 0 else [0, place]
    found = pixels_after(images, same_for(len(images), actions=actions), Augmentation(autoaugment=True))
    expected = torch.stack([act(image, ACTIONS[place]) for image in images])
    assert torch.equal(found.round().to(torch.uint8), expected)


def test_autocontrast_is_torchvisions_for_every_range_of_values():
    low, high = torch.triu_indices(256, 256)
    images = (low[:, None] + (high - low)[:, None] * torch.arange(25) // 24).to(torch.uint8)
    images = functional.pad(images[: len(images) // 3 * 3].view(-1, 3, 5, 5), [0, 0])
    action = ACTIONS.index(Action("AutoContrast"))
    found = pixels_after(images, same_for(len(images), actions=[action, 0]), Augmentation(autoaugment=True))
    assert torch.equal(found.round().to(torch.uint8), functional.autocontrast(images))


def test_equalize_is_torchvisions_for_many_histograms():
    rng = np.random.default_rng(0)
    law = [rng.dirichlet(np.full(256, concentration)) for concentration in (0.003, 0.01, 0.1, 1, 10) for _ in range(30)]
    images = torch.from_numpy(np.stack([rng.choice(256, size=(3, 32, 32), p=p) for p in law]).astype(np.uint8))
    action = ACTIONS.index(Action("Equalize"))
    found = pixels_after(images, same_for(len(images), actions=[action, 0]), Augmentation(autoaugment=True))
    assert torch.equal(found.round().to(torch.uint8), functional.equalize(images))


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (20, 31)], ids=["32x32", "28x28", "20x31"])
def test_no_pixel_is_taken_from_near_the_middle_between_two(size):
    """So float32 and float64, and any order of sums, name the same pixel."""
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    for action in ACTIONS:
        level = amount(action, size)
        if action.operation == "ShearY":
            places = [y + level * x - 0.5]
        elif action.operation == "Rotate":
            turn = (x - width / 2 + 1j * (y - height / 2)) * np.exp(1j * math.radians(level))
            places = [turn.real + width / 2 - 0.5, turn.imag + height / 2 - 0.5]
        else:
            continue  # a whole number of pixels, or none
        table = augment._source(action, height, width)[:-1].view(size)
        inside = (table < height * width).numpy()
        for place, found in zip(reversed(places), (table // width, table % width), strict=False):
            assert np.abs(place - np.floor(place) - 0.5).min() > 9e-4
            assert (np.rint(place) == found.numpy())[inside].all()


def test_pil_images_differ_by_at_most_two_of_255():
    smooth = torch.nn.functional.interpolate(noise(8, (6, 6)).float(), size=(32, 32), mode="bicubic")
    images = (smooth + 5 * torch.randn(smooth.shape, generator=generator())).clamp(0, 255).to(torch.uint8)
    for place, action in enumerate(ACTIONS):
        found = pixels_after(images, same_for(8, actions=[place, 0]), Augmentation(autoaugment=True)).numpy()
        theirs = [np.asarray(act(Image.fromarray(i.permute(1, 2, 0).numpy()), action)) for i in images]
        difference = np.abs(found - np.stack(theirs).transpose(0, 3, 1, 2)).max().round()
        bound = {"Contrast": 2, "Color": 1, "Sharpness": 1, "AutoContrast": 1}.get(action.operation, 0)
        assert difference <= bound, action


def test_the_pairs_of_actions_have_torchvisions_law():
    n, theirs_n = 200_000, 20_000
    draws = Augmentation(autoaugment=True).draw(n, (32, 32), generator())
    found = np.bincount((draws.actions @ torch.tensor([len(ACTIONS), 1])).numpy(), minlength=len(ACTIONS) ** 2)
    expected, theirs = np.zeros(len(ACTIONS) ** 2), np.zeros(len(ACTIONS) ** 2)

    def cell(policy, done, signs):
        first, second = (
            ACTIONS.index(Action(name, magnitude or 0, sign if name in augment.SIGNED else 1)) if yes else 0
            for (name, _, magnitude), yes, sign in zip(TORCHVISION.policies[policy], done, signs, strict=True)
        )
        return first * len(ACTIONS) + second

    for policy, pair in enumerate(TORCHVISION.policies):
        for done in itertools.product([False, True], repeat=2):
            chance = math.prod(p if yes else 1 - p for (_, p, _), yes in zip(pair, done, strict=True))
            for signs in itertools.product([-1, 1], repeat=2):
                expected[cell(policy, done, signs)] += n * chance / 25 / 4
    torch.manual_seed(0)
    for _ in range(theirs_n):
        policy, chance, signs = TORCHVISION.get_params(25)
        pair = TORCHVISION.policies[policy]
        done = [bool(chance[slot] <= pair[slot][1]) for slot in range(2)]
        theirs[cell(policy, done, [1 if sign else -1 for sign in signs])] += 1

    possible = expected > 0
    assert not found[~possible].any()
    assert not theirs[~possible].any()
    assert expected[possible].min() > 5
    assert stats.chisquare(found[possible], expected[possible]).pvalue > NEVER
    common = expected > n / theirs_n * 5
    table = np.stack([counts[common] for counts in (found, theirs)])
    assert stats.chi2_contingency(table).pvalue > NEVER


# ---------------------------------------------------------------------------------------------- the whole


def loop(images, draws, options, mean=MEAN, sd=SD):
    """Image by image and step by step with torchvision's functions."""
    changed = []
    for i, image in enumerate(images):
        height, width = image.shape[1:]
        for place in draws.actions[i] if options["autoaugment"] else ():
            image = act(image, ACTIONS[place])
        if options["flip"] and draws.flip[i]:
            image = functional.hflip(image)
        if options["crop"] != "none":
            mode = {"zero": "constant", "reflect": "reflect"}[options["crop"]]
            top, left = draws.corner[i].tolist()
            image = functional.crop(functional.pad(image, 4, padding_mode=mode), top, left, height, width)
        image = functional.normalize(functional.convert_image_dtype(image, torch.float32), mean, sd)
        if options["cutout"]:
            (row, column), half = draws.centre[i].tolist(), options["cutout"] // 2
            top, left, bottom, right = max(row - half, 0), max(column - half, 0), row + half, column + half
            image = functional.erase(image, top, left, min(bottom, height) - top, min(right, width) - left, 0.0)
        changed.append(image)
    if not options["mixup"]:
        return torch.stack(changed)
    share = draws.share.numpy()
    pairs = [(share[i], changed[i], changed[draws.partner[i]]) for i in range(len(images))]
    return torch.stack([s * own + (np.float32(1) - s) * other for s, own, other in pairs])


@pytest.mark.parametrize("size", [(32, 32), (20, 31)], ids=["32x32", "20x31"])
@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), *ONE_BY_ONE, Augmentation(flip=True, crop="zero", cutout=8), replace(ALL, mixup=0.0), ALL],
    ids=lambda a: "+".join(name for name, value in asdict(a).items() if value not in (False, 0, "none")) or "none",
)
def test_a_batch_is_what_a_loop_over_images_makes_of_its_draws(augmentation, size):
    images = noise(60, size)
    images[::2] = (images[::2] // 4) + torch.arange(0, 60, 2, dtype=torch.uint8).view(-1, 1, 1, 1) * 3
    before = images.clone()
    draws = augmentation.draw(60, size, generator(1))
    found = augmentation.apply(images, draws, MEAN, SD)
    assert found.dtype == torch.float32
    assert torch.equal(found, loop(images, draws, asdict(augmentation)))
    assert torch.equal(found, augmentation.apply(images, draws, MEAN.view(1, 3, 1, 1), SD.view(1, 3, 1, 1)))
    assert torch.equal(images, before)


@pytest.mark.parametrize("crop", ["zero", "reflect"])
def test_every_flip_and_corner_is_torchvisions(crop):
    places = list(itertools.product([0, 1], range(9), range(9)))
    images = noise(len(places), (6, 9))
    flip, corner = torch.tensor([place[0] for place in places]), torch.tensor([place[1:] for place in places])
    draws = augment.Draws(None, flip, corner, None, None, None)
    augmentation = Augmentation(flip=True, crop=crop)
    options = asdict(augmentation)
    assert torch.equal(augmentation.apply(images, draws, MEAN, SD), loop(images, draws, options))


@pytest.mark.parametrize("side", [1, 2, 7, 8, 16, 40])
def test_cutout_is_a_square_around_its_centre_without_what_lies_outside(side):
    height, width = 10, 13
    centre = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    draws = augment.Draws(None, None, None, centre, None, None)
    images = torch.full((len(centre), 3, height, width), 255, dtype=torch.uint8)
    found = Augmentation(cutout=side).apply(images, draws, torch.zeros(3), torch.ones(3))
    expected = np.ones((len(centre), 3, height, width), np.float32)
    for i, (row, column) in enumerate(centre.tolist()):
        for y in range(row - side // 2, row - side // 2 + side):
            for x in range(column - side // 2, column - side // 2 + side):
                if 0 <= y < height and 0 <= x < width:
                    expected[i, :, y, x] = 0
    np.testing.assert_array_equal(found.numpy(), expected)


def test_off_is_the_scaling_of_the_data_and_nothing_else():
    images, off = noise(4), Augmentation()
    assert not off.active
    draws = off.draw(4, (32, 32), generator())
    assert set(asdict(draws).values()) == {None}
    expected = (images.float() / 255 - MEAN.view(3, 1, 1)) / SD.view(3, 1, 1)
    assert torch.equal(off.apply(images, draws, MEAN, SD), expected)
    assert all(augmentation.active for augmentation in ONE_BY_ONE)


# ---------------------------------------------------------------------------------------------- laws


def test_flip_and_corner_are_uniform_and_independent():
    draws = Augmentation(flip=True, crop="zero").draw(100_000, (32, 32), generator())
    top, left = draws.corner.unbind(1)
    counts = torch.bincount((draws.flip * 9 + top) * 9 + left)
    assert counts.shape == (2 * 9 * 9,)
    assert stats.chisquare(counts).pvalue > NEVER


def test_the_corners_are_those_of_torchvisions_random_crop():
    """Its corner of an image padded by 4 on every side."""
    torch.manual_seed(0)
    theirs = [transforms.RandomCrop.get_params(torch.empty(3, 40, 40), (32, 32))[:2] for _ in range(5_000)]
    ours = Augmentation(crop="zero").draw(5_000, (32, 32), generator()).corner
    counts = [torch.bincount(corner @ torch.tensor([9, 1]), minlength=81) for corner in (torch.tensor(theirs), ours)]
    assert stats.chi2_contingency(torch.stack(counts)).pvalue > NEVER


def test_the_centre_of_cutout_is_any_pixel():
    draws = Augmentation(cutout=16).draw(100_000, (20, 31), generator())
    counts = torch.bincount(draws.centre @ torch.tensor([31, 1]))
    assert counts.shape == (20 * 31,)
    assert stats.chisquare(counts).pvalue > NEVER


def test_the_partners_of_mixup_are_a_uniform_permutation():
    rng, mixup = generator(), Augmentation(mixup=1.0)
    drawn = torch.stack([mixup.draw(4, (32, 32), rng).partner for _ in range(5_000)])
    assert torch.equal(drawn.sort(1).values, torch.arange(4).expand(5_000, 4))
    counts = torch.bincount(drawn @ torch.tensor([64, 16, 4, 1]), minlength=256)
    assert (counts > 0).sum() == 24
    assert stats.chisquare(counts[counts > 0]).pvalue > NEVER


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0])
def test_the_shares_of_mixup_have_the_beta_law(alpha):
    n = 200_000
    share = Augmentation(mixup=alpha).draw(n, (32, 32), generator()).share.double().numpy()
    law = stats.beta(alpha, alpha)
    middle = share[(share > 1e-6) & (share < 1 - 1e-6)]  # float32 rounds what is nearer to 1
    inside = law.cdf(1 - 1e-6) - law.cdf(1e-6)
    assert stats.binomtest(len(middle), n, inside).pvalue > NEVER
    assert stats.kstest(middle, lambda x: (law.cdf(x) - law.cdf(1e-6)) / inside).pvalue > NEVER
    assert abs(share.mean() - 0.5) < 4 * law.std() / math.sqrt(n)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.01)
    assert abs(np.corrcoef(share[:-1], share[1:])[0, 1]) < 4 / math.sqrt(n)


def test_a_tiny_alpha_mixes_nothing_but_swaps_half():
    share = Augmentation(mixup=1e-9).draw(10_000, (32, 32), generator()).share
    assert torch.equal(share, share.round())
    assert stats.binomtest(int(share.sum()), 10_000).pvalue > NEVER


# ---------------------------------------------------------------------------------------------- randomness, no waiting


def test_the_same_state_of_the_generator_gives_the_same_batch():
    rng, images = generator(5), noise(16)
    state = rng.get_state()
    outside = torch.get_rng_state()
    first, second = (ALL.draw(16, (32, 32), rng) for _ in range(2))
    rng.set_state(state)
    again = ALL.draw(16, (32, 32), rng)
    assert torch.equal(torch.get_rng_state(), outside)
    for name, value in asdict(first).items():
        assert torch.equal(value, getattr(again, name))
        assert not torch.equal(value, getattr(second, name))
    assert torch.equal(ALL.apply(images, first, MEAN, SD), ALL.apply(images, again, MEAN, SD))


@pytest.mark.parametrize("augmentation", [*ONE_BY_ONE, ALL], ids=repr)
def test_neither_draw_nor_apply_depends_on_a_value_on_the_host(augmentation):
    """Fake tensors have no values: what reads one, or has a shape that depends on one, fails."""
    images, rng = noise(8), generator()
    augmentation.apply(images, augmentation.draw(8, (32, 32), rng), MEAN, SD)  # makes the constants
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        images = fake.from_tensor(images)
        found = augmentation.apply(images, augmentation.draw(8, (32, 32), rng), MEAN, SD)
        assert isinstance(found, FakeTensor)
        for reads in (lambda: images.max().item(), lambda: images[images > 3]):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                reads()


class Watched(TorchDispatchMode):
    """Keeps the names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("augmentation", [*ONE_BY_ONE, ALL], ids=repr)
def test_neither_draw_nor_apply_brings_a_value_from_the_host(augmentation):
    images, rng = noise(8), generator()
    augmentation.apply(images, augmentation.draw(8, (32, 32), rng), MEAN, SD)
    waiting = {
        "lift_fresh",
        "scalar_tensor",
        "randperm",
        "bincount",
    }  # device and host wait
    with Watched() as watched:
        augmentation.apply(images, augmentation.draw(8, (32, 32), rng), MEAN, SD)
    assert "div_" in watched.names
    assert not waiting & watched.names
    with Watched() as control:
        torch.tensor(1.0), torch.where(images > 3, 1.0, 2.0), torch.randperm(3), torch.bincount(torch.arange(3))
    assert waiting <= control.names


@pytest.mark.parametrize("augmentation", [*ONE_BY_ONE, ALL], ids=repr)
def test_apply_stays_on_the_device_of_the_images(augmentation, monkeypatch):
    """With fake tensors, as there need not be a GPU: an operation on tensors of two devices fails."""
    draws = augmentation.draw(8, (32, 32), generator())
    augmentation.apply(noise(8), draws, MEAN, SD)  # makes the constants
    tables = {name: getattr(augment, name) for name in ("_action_tables", "_crop_tables")}

    def there(value):
        return None if value is None else torch.empty(value.shape, dtype=value.dtype, device="cuda:0")

    def constants(name):
        def found(*key):
            found = tables[name](*key[:-1], torch.device("cpu"))
            return tuple(map(there, found)) if type(found) is tuple else type(found)(*map(there, found))

        return found

    for name in tables:
        monkeypatch.setattr(augment, name, constants(name))
    numbers = asdict(draws).values()
    with FakeTensorMode():
        images, mean, sd = there(noise(8)), there(MEAN), there(SD)
        found = augmentation.apply(images, augment.Draws(*map(there, numbers)), mean, sd)
        assert found.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match=r"(to be on the same device|two different devices)"):
            found + torch.ones(3, 1, 1)


def test_the_constants_of_an_image_size_are_made_once():
    images = noise(3)
    tables = (augment._policy_tables, augment._action_tables, augment._crop_tables)
    for _ in range(2):
        before = [table.cache_info().misses for table in tables]
        ALL.apply(images, ALL.draw(3, (32, 32), generator()), MEAN, SD)
    assert [table.cache_info().misses for table in tables] == before


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_draws_and_changes_as_the_eager_calls_do_and_waits_for_nothing():
    images, mean, sd = noise(64).cuda(), MEAN.cuda(), SD.cuda()

    def step(rng):
        return ALL.apply(images, ALL.draw(64, (32, 32), rng), mean, sd)

    rng = torch.Generator("cuda")
    step(rng)  # makes the constants
    rng.manual_seed(3)
    try:
        torch.cuda.set_sync_debug_mode("error")
        expected = [step(rng) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rng.manual_seed(3)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        found = step(rng)
    for batch in expected:
        graph.replay()
        assert torch.equal(found, batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augmentation", [*ONE_BY_ONE, ALL], ids=repr)
def test_a_gpu_makes_of_the_same_draws_what_a_cpu_makes(augmentation):
    images, draws = noise(256), augmentation.draw(256, (32, 32), generator())
    there = augment.Draws(*(value if value is None else value.cuda() for value in asdict(draws).values()))
    found = augmentation.apply(images.cuda(), there, MEAN.cuda(), SD.cuda())
    torch.testing.assert_close(found.cpu(), augmentation.apply(images, draws, MEAN, SD), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("autoaugment", 1),
        ("flip", None),
        ("crop", "mirror"),
        ("cutout", -1),
        ("cutout", 1.5),
        ("cutout", True),
        ("mixup", -0.1),
        ("mixup", math.inf),
        ("mixup", math.nan),
        ("mixup", "0.2"),
        ("mixup", True),
    ],
)
def test_a_bad_option_is_named(field, value):
    with pytest.raises(InputError, match=rf"{field} = {value!r}: use "):
        Augmentation(**{field: value})


@pytest.mark.parametrize(
    ("batch", "size", "message"),
    [
        (0, (32, 32), "batch = 0: use 1 image or more"),
        (2.0, (32, 32), "batch = 2.0: "),
        (8, (4, 32), "size = .4, 32.: use images of 5 pixels or more"),
        (8, (32,), "size = .32,.: "),
        (8, 32, "size = 32: "),
    ],
)
def test_a_bad_batch_or_size_is_named(batch, size, message):
    with pytest.raises(InputError, match=message):
        ALL.draw(batch, size, generator())


def test_bad_images_and_scalings_are_named():
    images, draws = noise(8), ALL.draw(8, (32, 32), generator())
    for wrong in (images.float(), images[:, :1], images[0]):
        with pytest.raises(InputError, match=r"images = .*: give uint8 images of shape"):
            ALL.apply(wrong, draws, MEAN, SD)
    with pytest.raises(InputError, match=r"size = \(32, 3\): use images of 5 pixels"):
        ALL.apply(images[..., :3], draws, MEAN, SD)
    for wrong in (MEAN[:2], MEAN.long(), MEAN.to("meta")):
        with pytest.raises(InputError, match=r"mean = .*: give 3 floats, one per channel, on cpu"):
            ALL.apply(images, draws, wrong, SD)
        with pytest.raises(InputError, match=r"sd = .*: give 3 floats, one per channel, on cpu"):
            ALL.apply(images, draws, MEAN, wrong)


def test_draws_that_do_not_fit_are_named():
    images, draws = noise(8), ALL.draw(8, (32, 32), generator())
    with pytest.raises(InputError, match=r"draws.actions = '\(8, 2\) on cpu': draw 7 images"):
        ALL.apply(images[:7], draws, MEAN, SD)
    for name, value in asdict(draws).items():
        with pytest.raises(InputError, match=rf"draws.{name} = None: draw 8 images with Augmentation"):
            ALL.apply(images, replace(draws, **{name: None}), MEAN, SD)
        with pytest.raises(InputError, match=rf"draws.{name} = .*meta.*: draw 8 images"):
            ALL.apply(images, replace(draws, **{name: value.to("meta")}), MEAN, SD)
    with pytest.raises(InputError, match=r"draws.actions = '.*': draw 8 images with Augmentation"):
        replace(ALL, autoaugment=False).apply(images, draws, MEAN, SD)
