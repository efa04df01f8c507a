"""DOLG: the fused parts are orthogonal and make up the local feature again; names of the official code."""

import torch

from omniconv.models.factory import create_model
from omniconv.models.image.dolg import OFFICIAL_NAMES, LocalBranch, MultiAtrous, OrthogonalFusion
from omniconv.models.weights import rename

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def test_local_parts_are_orthogonal_to_the_whole_and_add_up():
    torch.manual_seed(0)
    local, whole = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    tiled, rest = OrthogonalFusion()(local, whole).chunk(2, 1)
    assert torch.equal(tiled, whole[:, :, None, None].expand_as(local))
    for n in range(2):
        for i in range(5):
            for j in range(4):
                share = local[n, :, i, j] @ whole[n] / (whole[n] @ whole[n])
                torch.testing.assert_close(rest[n, :, i, j], local[n, :, i, j] - share * whole[n])
    torch.testing.assert_close((rest * tiled).sum(1), torch.zeros(2, 5, 4, dtype=torch.float64))
    assert torch.equal(OrthogonalFusion()(local, 0 * whole).chunk(2, 1)[1], local)
    inputs = (local[:1, :, :2, :2].clone().requires_grad_(), whole[:1].clone().requires_grad_())
    assert torch.autograd.gradcheck(OrthogonalFusion(), inputs)


def test_dilated_branches_see_nine_pixels_each():
    block = MultiAtrous(3, 2, (2, 5))
    for conv, dilation in zip(block.aspp[1:], (2, 5), strict=True):
        x = torch.randn(1, 3, 13, 13, requires_grad=True)
        (gradient,) = torch.autograd.grad(conv(x)[0, 0, 6, 6], x)
        seen = {tuple(place) for place in gradient[0].abs().sum(0).nonzero().tolist()}
        assert seen == {(6 + i * dilation, 6 + j * dilation) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_lengths_of_local_features_are_the_attention():
    torch.manual_seed(0)
    branch = LocalBranch(6, 4, (1, 2)).eval()
    x = torch.randn(2, 6, 5, 4)
    z = branch.bn(branch.conv1(branch.aspp(x)))
    attention = (1 + branch.conv2(z.relu()).exp()).log()
    torch.testing.assert_close(branch(x).norm(dim=1, keepdim=True), attention)


def test_official_names_become_ours():
    """Names typed from feymanpriv/DOLG, core/model/dolg_model.py and resnet.py."""

    def norm(prefix):
        return [f"{prefix}.{key}" for key in NORM]

    names = ["globalmodel.stem.conv.weight", *norm("globalmodel.stem.bn")]
    for stage, depth in enumerate((3, 4, 23, 3), 1):
        for index in range(1, depth + 1):
            block = f"globalmodel.s{stage}.b{index}"
            names += [f"{block}.proj.weight", *norm(f"{block}.bn")] if index == 1 else []
            for letter in "abc":
                names += [f"{block}.f.{letter}.weight", *norm(f"{block}.f.{letter}_bn")]
    layers = [f"aspp.aspp.{i}" for i in range(4)] + ["aspp.im_pool.1", "aspp.conv_after.0", "conv1", "conv2"]
    names += [f"localmodel.{layer}.{key}" for layer in layers for key in ("weight", "bias")]
    names += [*norm("localmodel.bn"), "pool_g.p", "desc_cls.weight", "desc_cls.t"]
    names += [f"{layer}.{key}" for layer in ("fc_t", "fc") for key in ("weight", "bias")]
    state = create_model("dolg_resnet101", device="meta").state_dict()
    assert set(rename(dict.fromkeys(names, torch.empty(0)), OFFICIAL_NAMES)) == set(state)
    assert create_model("dolg_resnet50", num_classes=0, device="meta")(
        torch.empty(1, 3, 64, 64, device="meta")
    ).shape == (
        1,
        512,
    )
