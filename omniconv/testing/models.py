"""The contract of a network, as small named checks over its name; `check_model` runs them.

Small variants (`*_test`) run everything. Of the published ones only the counts are held against the paper's,
on the meta device, so that no weight is ever made.
"""

import copy
import dataclasses
import io
import pickle

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from omniconv.core.cases import Raises
from omniconv.core.errors import UsageError
from omniconv.design.cost import count_cost
from omniconv.layers.conv.reparam import Mergeable
from omniconv.models.backbone import Backbone
from omniconv.models.factory import create_model, get_variant
from omniconv.testing.harness import (
    Check,
    compile_counted,
    compile_inductor,
    module_gradients,
    poisoned_memory,
    randomize,
    require,
    require_equal,
    require_equal_gradients,
    require_finite_gradients,
    run_checks,
    seeded,
    state_copy,
)
from omniconv.testing.layers import expect

__all__ = ["COUNT_CHECKS", "MODEL_CHECKS", "SLOW_MODEL_CHECKS", "check_model", "count_tolerance"]

CLASSES = 5
SHAPES = ((2, 3, 64, 96), (3, 3, 65, 97), (4, 3, 128, 64))
"""Compiled and exported at the first one: not square, and large enough for a last map beyond one pixel."""


def _make(name: str, *, in_chans: int = 3, num_classes: int = CLASSES, random_state: bool = True) -> Backbone:
    with seeded():
        model = create_model(name, num_classes=num_classes, in_chans=in_chans)
    if random_state:
        randomize(model)
    return model.train()


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)


def _evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), seeded(3):
        return model.eval()(x)


def count_tolerance(published: float, relative: float) -> float:
    """Return by how much a count may differ from a printed one: `relative`, or half its last printed digit.

    At least two digits count as printed.
    """
    digits = f"{published:.0f}".rstrip("0")
    places = len(f"{published:.0f}") - max(2, len(digits))
    return max(relative * published, 0.5 * 10 ** max(0, places))


def published_counts(name: str) -> None:
    """Parameters (1%) and multiply-adds (3%) are the published ones, of the deployed form where those are."""
    variant = get_variant(name)
    if variant.params is None and variant.macs is None:
        return
    model = create_model(name, num_classes=variant.classes, device="meta")
    model = model.deploy() if variant.deployed else model
    parameters = sum(p.numel() for p in model.parameters())
    mend = "compare layer by layer with the paper's table, or correct the figure in VARIANTS"
    if variant.params is not None:
        close = abs(parameters - variant.params) <= count_tolerance(variant.params, 0.01)
        require(close, f"{parameters:,} parameters instead of {variant.params:,.0f}", mend)
    if variant.macs is not None:
        macs = count_cost(model, (3, variant.size, variant.size)).macs
        close = abs(macs - variant.macs) <= count_tolerance(variant.macs, 0.03)
        require(close, f"{macs:,} multiply-adds instead of {variant.macs:,.0f}", mend)


def configuration_is_frozen_data(name: str) -> None:
    """The configuration is a frozen dataclass that equals a copy made from its fields."""
    config = get_variant(name).config
    settings = getattr(config, "__dataclass_params__", None)
    frozen = settings is not None and settings.frozen
    require(frozen, f"{type(config).__name__} can be changed", "decorate it with @dataclass(frozen=True)")
    require(config == dataclasses.replace(config), "a copy differs", "compare by fields")


def is_small(name: str) -> None:
    """A variant for tests has fewer than a million parameters."""
    count = sum(p.numel() for p in create_model(name, device="meta").parameters())
    require(count < 1_000_000, f"it has {count:,}", "take fewer and narrower layers")


def meta_construction(name: str) -> None:
    """Made on the meta device, it takes no memory."""
    model = create_model(name, device="meta")
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        require(tensor.is_meta, f"{key} is on {tensor.device}", "make no tensor with an explicit device")


def same_seed_same_state(name: str) -> None:
    """Two constructions under one seed are equal, finite, and change no default of torch."""
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()
    first, other = state_copy(_make(name, random_state=False)), state_copy(_make(name, random_state=False))
    after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()
    require(before == after, f"construction changed {before} to {after}", "leave torch's defaults alone")
    for key, tensor in first.items():
        require_equal(tensor, other[key], key, "draw from torch's global generator only")
        require(bool(torch.isfinite(tensor).all()), f"{key} is not finite", "initialise it")


def output_shape_and_dtype(name: str) -> None:
    """Logits are (N, classes), finite, of the input's type, in float32, bfloat16 and under autocast."""
    for dtype in (torch.float32, torch.bfloat16):
        model = _make(name).to(dtype)
        for training in (True, False):
            with torch.no_grad(), seeded():
                logits = model.train(training)(_images(2, 3, 64, 96, dtype=dtype))
            got = tuple(logits.shape), logits.dtype
            require(got == ((2, CLASSES), dtype), f"logits {got}", f"should be {((2, CLASSES), dtype)}")
            require(bool(torch.isfinite(logits).all()), f"logits in {dtype} are not finite", "mind the scale")
    with torch.autocast("cpu", torch.bfloat16):
        logits = _evaluate(_make(name), _images(2, 3, 64, 96))
    require(bool(torch.isfinite(logits).all()), "logits under autocast are not finite", "mind the scale")


def small_and_odd_sizes(name: str) -> None:
    """Images of 32 x 32 and of odd, non-square sizes work."""
    model = _make(name)
    for shape in ((1, 3, 32, 32), (2, 3, 33, 47), (1, 3, 71, 39)):
        logits = _evaluate(model, _images(*shape))
        fine = logits.shape == (shape[0], CLASSES) and bool(torch.isfinite(logits).all())
        require(fine, f"images {shape} give {tuple(logits.shape)} or NaN", "pad so that no map gets empty")


def inputs_unmodified(name: str) -> None:
    """Images are the same after the call, in training and eval mode."""
    for training in (True, False):
        x = _images(2, 3, 64, 96)
        kept = x.clone()
        _make(name).train(training)(x)
        require(
            torch.equal(x, kept) and x._version == 0,
            "images were changed in place",
            "start with a new tensor",
        )


def samples_are_independent(name: str) -> None:
    """In eval mode a batch of one gives what it gives inside a larger batch."""
    model, x = _make(name).double(), _images(3, 3, 64, 96, dtype=torch.float64)
    whole = _evaluate(model, x)
    for index in range(len(x)):
        one = _evaluate(model, x[index : index + 1])
        require_equal(
            one, whole[index : index + 1], f"sample {index}", "compute per sample in eval mode", 1e-9
        )


def channels_last(name: str) -> None:
    """In channels-last, network and images give the same logits and gradients."""
    model, x = _make(name).eval(), _images(2, 3, 64, 96)
    wanted, expected = module_gradients(model, [x])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits, gradients = module_gradients(model, [x.contiguous(memory_format=torch.channels_last)])
    require_equal(logits, wanted, "logits", "use reshape instead of view", 1e-4)
    require_equal_gradients(gradients, expected, "use reshape instead of view", 1e-3)


def finite_gradients(name: str) -> None:
    """Every parameter and the images get a finite gradient in training mode."""
    _, gradients = module_gradients(_make(name), [_images(2, 3, 64, 96)])
    require_finite_gradients(gradients)


def gradients_are_right(name: str) -> None:
    """In float64 the gradients of images and parameters are those of finite differences."""
    model = _make(name).double()
    tensors = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    random = torch.Generator().manual_seed(6)
    x, *steps = (
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in [(2, 3, 40, 56), (2, 3, 40, 56), *(p.shape for p in tensors.values())]
    )
    weights = torch.randn(2, CLASSES, generator=random, dtype=torch.float64)

    # Every tensor moves along one direction of its own, so that the Jacobian has one entry a tensor.
    def function(moves: Tensor) -> Tensor:
        named = {
            key: p + move * step
            for (key, p), move, step in zip(tensors.items(), moves[1:], steps[1:], strict=True)
        }
        with seeded(3):
            return (functional_call(model, named, (x + moves[0] * steps[0],)) * weights).sum()

    moves = torch.zeros(len(steps), dtype=torch.float64, requires_grad=True)
    # Steps of 1e-7 cross next to none of the network's many kinks.
    gradcheck(function, (moves,), eps=1e-7, rtol=1e-3, atol=1e-4)


def features_match_their_description(name: str) -> None:
    """Maps of `features_only` have the channels, strides and modules that `feature_info` says."""
    with seeded():
        model = create_model(name, features_only=True)
    randomize(model).eval()
    info = model.feature_info
    small, large = (_images(1, 3, 64, 96), _images(1, 3, 128, 192))
    outputs: dict[str, list[Tensor]] = {}
    hooks = []
    for feature in info:
        found = outputs.setdefault(feature["module"], [])
        module = model.backbone.get_submodule(feature["module"])
        hooks.append(module.register_forward_hook(lambda m, a, y, found=found: found.append(y)))
    with torch.no_grad():
        maps = model(small)
        seen = {key: list(found) for key, found in outputs.items()}
        larger = model(large)
    for hook in hooks:
        hook.remove()
    require(len(maps) == len(info), f"{len(maps)} maps, {len(info)} descriptions", "describe every map")
    mend = "correct feature_info or forward_stages"
    for index, (feature, y, z) in enumerate(zip(info, maps, larger, strict=True)):
        channels = feature["num_chs"]
        require(y.shape[1] == channels, f"map {index} has {y.shape[1]} channels, not {channels}", mend)
        # The growth of a map tells its stride exactly, whatever the padding.
        grown = [b - a for a, b in zip(y.shape[2:], z.shape[2:], strict=True)]
        wanted = [64 / feature["reduction"], 96 / feature["reduction"]]
        fault = f"map {index} grows by {grown} pixels from 64 x 96 to 128 x 192, not {wanted}"
        require(grown == wanted, fault, mend)
        given = any(torch.equal(y, output) for output in seen[feature["module"]])
        require(given, f"map {index} is not the output of {feature['module']}", mend)
    torch.stack([y.mean() for y in model(small)]).sum().backward()
    idle = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    fault = f"features_only keeps {', '.join(idle[:3])}, which no map depends on"
    require(not idle, fault, "register modules in the order in which they run")
    one = create_model(name, features_only=True, out_indices=(-1, 0)).feature_info.channels()
    wanted = [info.channels()[-1], info.channels()[0]]
    require(
        one == wanted, f"out_indices=(-1, 0) describes {one}, not {wanted}", "index feature_info as the maps"
    )


def head_follows_features(name: str) -> None:
    """`forward` is `forward_head` of `forward_features`; the classifier reads what `pre_logits` gives."""
    model, x = _make(name).eval(), _images(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model(x)
        require_equal(model.forward_head(features), logits, "forward_head", "keep forward the sum of both")
        got = tuple(features.shape[:2])
        wanted = (2, model.num_features)
        require(got == wanted, f"forward_features gives {got}", f"should begin with {wanted}")
        classifier = model.get_classifier()
        mend = "let pre_logits stop right before the classifier"
        require_equal(classifier(pooled).flatten(1), logits, "classifier of pre_logits", mend, 1e-5)


def classifier_can_be_replaced(name: str) -> None:
    """`reset_classifier` gives other logits, 0 classes none, before and after construction alike."""
    model, x = _make(name), _images(2, 3, 64, 96)
    model.reset_classifier(7)
    require(model.num_classes == 7, f"num_classes is {model.num_classes} after reset to 7", "set it")
    require(_evaluate(model, x).shape == (2, 7), "reset_classifier(7) does not give 7 logits", "set it")
    for what, headless in (("reset_classifier(0)", model), ("num_classes=0", _make(name, num_classes=0))):
        headless.reset_classifier(0)
        output = _evaluate(headless, x)
        require(
            isinstance(headless.get_classifier(), nn.Identity),
            f"{what} leaves a classifier",
            "use nn.Identity",
        )
        wanted = headless.forward_head(headless.forward_features(x), pre_logits=True)
        require(
            output.shape == wanted.shape, f"{what} gives {tuple(output.shape)}", "return the pooled features"
        )
    keys = [set(m.state_dict()) for m in (model, _make(name, num_classes=0))]
    require(
        keys[0] == keys[1], f"reset to 0 and made with 0 differ in {keys[0] ^ keys[1]}", "make them the same"
    )


def any_number_of_channels(name: str) -> None:
    """Images of one and of five channels work."""
    for channels in (1, 5):
        logits = _evaluate(_make(name, in_chans=channels), _images(2, channels, 64, 96))
        require(
            logits.shape == (2, CLASSES), f"in_chans={channels} gives {tuple(logits.shape)}", "use in_chans"
        )


def deploy_gives_the_same(name: str) -> None:
    """`deploy` leaves the network as it is and returns one that gives the same logits without branches."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model, x = _make(name).to(dtype), _images(2, 3, 64, 96, dtype=dtype)
        modules = {key: type(module) for key, module in model.named_modules()}
        before = state_copy(model)
        deployed = model.deploy()
        require(model.training and not deployed.training, "deploy changed the mode", "copy, then eval()")
        same = modules == {key: type(module) for key, module in model.named_modules()}
        require(same, "deploy changed the network's modules", "merge a copy")
        for key, tensor in state_copy(model).items():
            require_equal(tensor, before[key], key, "merge a copy")
        wanted = _evaluate(model, x)
        require_equal(_evaluate(deployed, x), wanted, f"logits in {dtype}", "see merged()", tolerance)
        left = [type(m).__name__ for m in deployed.modules() if isinstance(m, Mergeable)]
        require(not left, f"{left} are not merged", "let merged() return plain modules")


def state_round_trip(name: str) -> None:
    """The state dict has one set of keys in both modes and, loaded strictly, gives the same logits bitwise."""
    model, x = _make(name), _images(2, 3, 64, 96)
    train, evaluation = list(model.train().state_dict()), list(model.eval().state_dict())
    require(train == evaluation, "the keys depend on the mode", "keep the same state in both modes")
    wanted = _evaluate(model, x)
    with seeded(7):
        other = create_model(name, num_classes=CLASSES)
    other.load_state_dict(model.state_dict(), strict=True)
    require_equal(_evaluate(other, x), wanted, "logits after loading", "keep no state outside the state dict")


def copies(name: str) -> None:
    """Deep copies and pickles give the same logits."""
    model, x = _make(name), _images(2, 3, 64, 96)
    wanted = _evaluate(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    require_equal(_evaluate(copy.deepcopy(model), x), wanted, "deepcopy", "keep plain attributes")
    require_equal(_evaluate(pickle.loads(pickle.dumps(model)), x), wanted, "pickle", "keep no lambdas")
    loaded = torch.load(buffer, weights_only=False)
    require_equal(_evaluate(loaded, x), wanted, "torch.save", "keep no lambdas")


def compiles_once(name: str) -> None:
    """`torch.compile` gets one whole graph for three sizes, with the logits and gradients of eager mode."""
    eager, compiled = _make(name), _make(name)
    call, graphs = compile_counted(compiled)
    first: int | None = None
    for shape in SHAPES:
        x = _images(*shape)
        wanted, expected = module_gradients(eager, [x])
        logits, gradients = module_gradients(compiled, [x], call)
        require_equal(logits, wanted, f"logits of {shape}", "avoid Python state", 1e-4)
        require_equal_gradients(gradients, expected, "avoid Python state", 1e-3)
        first = len(graphs) if first is None else first
        require(
            len(graphs) == first, f"{shape} needs a new graph", "compute sizes from x.shape, branch on none"
        )


def exports(name: str) -> None:
    """`torch.export` with batch, height and width dynamic equals eager mode at other sizes."""
    model = _make(name).eval()
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        axes = ({0: dynamic, 2: dynamic, 3: dynamic},)
        program = torch.export.export(model, (_images(*SHAPES[0]),), dynamic_shapes=axes).module()
        for shape in SHAPES[1:]:
            x = _images(*shape)
            require_equal(program(x), model(x), f"images {shape}", "compute sizes from x.shape", 1e-4)


def inductor_agrees(name: str) -> None:
    """Compiled with inductor, it gives the logits and gradients of eager mode."""
    eager, compiled, x = _make(name).eval(), _make(name).eval(), _images(*SHAPES[0])
    wanted, expected = module_gradients(eager, [x])
    logits, gradients = module_gradients(compiled, [x], compile_inductor(compiled))
    require_equal(logits, wanted, "logits", "report it to torch", 1e-3)
    require_equal_gradients(gradients, expected, "report it to torch", 1e-2)


def reads_no_fresh_memory(name: str) -> None:
    """Logits and gradients do not change when fresh memory is full of NaN."""
    x = [_images(2, 3, 64, 96)]
    wanted, expected = module_gradients(_make(name), x)
    with poisoned_memory():
        logits, gradients = module_gradients(_make(name), x)
    require_equal(logits, wanted, "logits", "write what torch.empty gives before reading it", 1e-5)
    require_equal_gradients(gradients, expected, "initialise buffers", 1e-4)


def unknown_names_are_explained(name: str) -> None:
    """A misspelt name or option fails with the nearest right one."""
    option = dataclasses.fields(get_variant(name).config)[0].name
    for wanted, call in (
        (f"no model '{name}x'; did you mean {name}?", lambda: create_model(f"{name}x")),
        (
            f"{name} has no option '{option}x'; did you mean {option}?",
            lambda: create_model(name, features_only=False, **{f"{option}x": 1}),
        ),
    ):
        expect(Raises(UsageError, wanted), call)


COUNT_CHECKS: tuple[Check, ...] = (published_counts, configuration_is_frozen_data)

MODEL_CHECKS: tuple[Check, ...] = (
    *COUNT_CHECKS,
    is_small,
    meta_construction,
    same_seed_same_state,
    output_shape_and_dtype,
    small_and_odd_sizes,
    inputs_unmodified,
    samples_are_independent,
    channels_last,
    finite_gradients,
    gradients_are_right,
    features_match_their_description,
    head_follows_features,
    classifier_can_be_replaced,
    any_number_of_channels,
    deploy_gives_the_same,
    state_round_trip,
    copies,
    compiles_once,
    exports,
    reads_no_fresh_memory,
    unknown_names_are_explained,
)

SLOW_MODEL_CHECKS: tuple[Check, ...] = (inductor_agrees,)


def check_model(name: str) -> None:
    """Run the contract of a network: everything for a `*_test` variant, the counts for any other.

    Raises:
        ContractError: naming every check that failed, the fault and the mend.
    """
    run_checks(MODEL_CHECKS if name.endswith("_test") else COUNT_CHECKS, name, name)
