"""RoIAlign against torchvision's CPU kernel and against grid_sample."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from mmdet.ops import multilevel_roi_align, roi_align
from mmdet.ops._roi_align import layout_of

SCALE = 1 / 8
SCALES = [1 / 4, 1 / 8, 1 / 16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
OPTIONS = [(ratio, aligned) for ratio in (0, 1, 2) for aligned in (True, False)]


def make_rois(count: int = 40) -> Tensor:
    """RoIs on two images of 240 x 160 pixels: inside, across the border, outside, thin, empty, inverted."""
    corners = torch.rand(count, 2, 2) * torch.tensor([300.0, 220.0]) - 30
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    special = torch.tensor([
        [0.0, 0, 240, 160], [10, 10, 10, 10], [10, 10, 10.5, 150], [50, 60, 20, 30], [-90, -90, -20, -20],
        [500, 500, 600, 600], [-400, -300, 900, 800], [7.5, 7.5, 15.5, 15.5]])
    boxes = torch.cat([boxes, special])
    return torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], 1)


def both(
        x: Tensor, rois: Tensor, output_size: tuple[int, int], ratio: int, aligned: bool
) -> list[list[Tensor]]:
    """Output and input gradient of ours on x's device and of torchvision on the CPU in x's compute dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad = torch.randn(len(rois), x.shape[1], *output_size).to(x)
    results = []
    for op, device, dtype in (
            (roi_align, x.device, x.dtype), (torchvision.ops.roi_align, torch.device('cpu'), compute)):
        leaf = x.detach().to(device, dtype).requires_grad_()
        boxes = rois.to(device, compute)
        output = op(leaf, boxes, output_size, SCALE, ratio, aligned)
        output.backward(grad.to(output))
        results.append([output.detach(), leaf.grad])
    return results


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('ratio, aligned', OPTIONS)
@pytest.mark.parametrize('channels, layout', [(5, LAYOUTS[0]), *((c, LAYOUTS[1]) for c in (5, 37, 40))])
def test_equals_torchvision(device, dtype, ratio, aligned, channels, layout):
    x = torch.randn(2, channels, 20, 30).to(device, dtype, memory_format=layout)
    ours, theirs = both(x, make_rois(), (7, 5), ratio, aligned)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    assert ours[0].is_contiguous() and ours[1].is_contiguous(memory_format=layout)
    for ours_part, theirs_part in zip(ours, theirs):
        assert ours_part.dtype == dtype
        torch.testing.assert_close(
            ours_part.cpu().to(theirs_part), theirs_part, rtol=tolerance,
            atol=tolerance * theirs_part.abs().max().item())


@pytest.mark.parametrize('size, layout', [
    ((2, 3, 4, 5), LAYOUTS[1]), ((2, 1, 4, 5), LAYOUTS[0]), ((2, 3, 1, 1), LAYOUTS[0])])
def test_layout_of_what_is_like_a_map(size, layout):
    assert layout_of(torch.empty(size).to(memory_format=torch.channels_last)) is layout
    for x in (torch.empty(size), torch.empty(2, 3, 4, 5).transpose(2, 3)):
        assert layout_of(x) is torch.contiguous_format


def test_equals_grid_sample(device):
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64, device=device)
    box = torch.tensor([16.0, 24, 72, 80], dtype=torch.float64)  # 7 x 7 cells, inside
    rois = torch.cat([torch.zeros(1), box])[None].to(device)
    cells = box[:2, None] * SCALE + (torch.arange(14) + 0.5) / 2  # two points a bin, in cells
    grid = torch.stack(torch.meshgrid(cells[0], cells[1], indexing='xy'), -1)[None].to(device) / 16 * 2 - 1
    expected = F.avg_pool2d(F.grid_sample(x, grid, align_corners=False), 2)
    torch.testing.assert_close(roi_align(x, rois, 7, SCALE, 2), expected)


@pytest.mark.parametrize('ratio, aligned', OPTIONS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradcheck(device, ratio, aligned, layout):
    features = [
        torch.randn(2, 2, *size, dtype=torch.float64, device=device).to(memory_format=layout).requires_grad_()
        for size in ((6, 7), (3, 4))]
    rois = torch.tensor([[0, 3.3, 5.1, 40, 38], [1, -9, 2, 80, 21], [0, 9, 9, 12, 10.5]]).to(features[0])
    assert levels_of(rois, 18, 2).tolist() == [0, 1, 0]
    options = None, SCALES[1:], 2, 3, ratio, aligned, 0.25, 18.0
    torch.autograd.gradcheck(
        lambda *x: torch.ops.mmdet.roi_align(x, rois, *options), features, nondet_tol=1e-12, fast_mode=False)


def test_no_gradient_of_the_gradient(device):
    x = torch.randn(1, 2, 6, 6, device=device, requires_grad=True)
    output = roi_align(x, torch.tensor([[0, 1.0, 1, 40, 40]], device=device), 2, SCALE)
    [grad] = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='derivative for mmdet::roi_align_backward is not'):
        grad.sum().backward()


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('samples', [2, 12, 14, 19, 31])
def test_half_of_a_bin_is_a_half(samples, layout):
    """Mask targets are what reaches 0.5: a bin of which half is the object must not fall short of it."""
    x = torch.zeros(1, 2, 4 * samples, 4 * samples).to(memory_format=layout)
    x[:, :, :2 * samples] = 1
    found = roi_align(x, torch.tensor([[0, 0.0, samples, samples, 3 * samples]]), 1, 1.0)
    assert torch.equal(found, torch.full((1, 2, 1, 1), 0.5))


def levels_of(rois: Tensor, finest_scale: float, levels: int) -> Tensor:
    """FPN's equation 1 of each RoI, in float64; -1 where a RoI is turned over on one side."""
    area = (rois[:, 3:] - rois[:, 1:3]).double().prod(dim=1)
    return (area / finest_scale**2).log2().div(2).floor().clamp(0, levels - 1).nan_to_num(-1).long()


def make_pyramid(device, dtype=torch.float32, layout=torch.contiguous_format) -> list[Tensor]:
    """Three levels of two images of 240 x 160 pixels."""
    levels = [torch.randn(2, 6, *size) for size in ((40, 60), (20, 30), (10, 15))]
    return [level.to(device, dtype, memory_format=layout).requires_grad_() for level in levels]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('ratio, given', [(0, False), (2, False), (0, True)])
def test_each_roi_on_its_level(device, dtype, layout, ratio, given):
    """Against torchvision on one level at a time; no RoI is on the last level, and some are on none."""
    features, rois = make_pyramid(device, dtype, layout), make_rois()
    rois[-1, 3] = -50  # turned over, on no level
    rois = rois[rois[:, 1] > -400]  # without the largest
    levels = torch.tensor([0, 1, 7, -1])[torch.arange(len(rois)) % 4] if given else levels_of(rois, 64, 3)
    assert levels.unique().tolist()[:3] == [-1, 0, 1] and 2 not in levels
    chosen = levels.to(device) if given else None
    output = multilevel_roi_align(features, rois.to(device), (7, 5), SCALES, ratio, 64, levels=chosen)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = [feature.detach().cpu().to(compute).requires_grad_() for feature in features]
    expected = torch.zeros(output.shape, dtype=compute)
    for i, level in enumerate(theirs[:2]):
        expected[levels == i] = torchvision.ops.roi_align(
            level, rois[levels == i].to(compute), (7, 5), SCALES[i], ratio, aligned=True)
    weight = torch.randn_like(output)
    grads = torch.autograd.grad(output, features, weight)
    others = expected, *torch.autograd.grad(expected, theirs[:2], weight.cpu().to(compute)), 0 * theirs[2]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    for part, other in zip((output, *grads), others, strict=True):
        assert part.dtype == dtype
        torch.testing.assert_close(
            part.cpu().to(compute), other, rtol=tolerance, atol=tolerance * other.abs().max().item())
    assert all(grad.is_contiguous(memory_format=layout) for grad in grads)


def test_levels_in_different_layouts(device):
    features, rois = make_pyramid(device), make_rois().to(device)
    expected = multilevel_roi_align(features, rois, 7, SCALES, finest_scale=32)
    for chosen in (0, 1):
        mixed = [x.detach().to(memory_format=LAYOUTS[i == chosen]).requires_grad_()
                 for i, x in enumerate(features)]
        output = multilevel_roi_align(mixed, rois, 7, SCALES, finest_scale=32)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert all(x.grad.shape == x.shape for x in mixed)


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('ratio', [0, 2])
def test_deterministic_gradient_on_cuda(dtype, layout, ratio):
    features, rois = make_pyramid('cuda', dtype, layout), make_rois(300).cuda()
    rois[::5, 3] = -50  # on no level
    output = multilevel_roi_align(features, rois, (7, 5), SCALES, ratio, 32)
    weight = torch.randn_like(output)
    expected = torch.autograd.grad(output, features, weight, retain_graph=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(output, features, weight, retain_graph=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other, atomic in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, atomic)


def test_large_sparse_roi(device):
    """A RoI far wider than its samples takes the path that gathers columns."""
    ours, theirs = both(
        torch.randn(1, 2, 8, 200).to(device), torch.tensor([[0.0, 5, 3, 1500, 60]]), (2, 3), 1, True)
    for ours_part, theirs_part in zip(ours, theirs):
        torch.testing.assert_close(ours_part.cpu(), theirs_part)


@pytest.mark.parametrize('layout', ['channels_last', 'slice', 'transposed', 'expanded'])
def test_strides(device, layout):
    x = torch.randn(2, 6, 20, 30, device=device)
    strided = {
        'channels_last': x.contiguous(memory_format=torch.channels_last),
        'slice': torch.randn(2, 9, 25, 33, device=device)[:, 1:7, 2:22, 3:],
        'transposed': torch.randn(2, 6, 30, 20, device=device).transpose(2, 3),
        'expanded': torch.randn(2, 1, 20, 30, device=device).expand(2, 6, 20, 30),
    }[layout]
    assert not strided.is_contiguous()
    rois = make_rois().to(device)
    plain = strided.clone(memory_format=torch.contiguous_format).requires_grad_()
    other = strided.requires_grad_()
    expected = roi_align(plain, rois, 7, SCALE)
    output = roi_align(other, rois.t().contiguous().t(), 7, SCALE)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(other.grad, plain.grad)


def test_gradient_that_is_a_view(device):
    """sum() sends an expanded gradient of strides zero."""
    x = torch.randn(2, 3, 20, 30, device=device, requires_grad=True)
    output = roi_align(x, make_rois().to(device), 7, SCALE)
    grads = torch.autograd.grad(output.sum(), x, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(output, x, torch.ones_like(output)))


def test_nothing_to_pool(device):
    x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    output = roi_align(x, torch.zeros(0, 5, device=device), (7, 5), SCALE)
    assert output.shape == (0, 3, 7, 5)
    output.sum().backward()
    assert x.grad.count_nonzero() == 0 and x.grad.shape == x.shape
    rois = torch.tensor([[0.0, 0, 0, 9, 9]], device=device)
    for shape in ((1, 3, 0, 8), (1, 3, 8, 0), (1, 0, 8, 8)):
        empty = torch.randn(shape, device=device, requires_grad=True)
        output = roi_align(empty, rois, 2, SCALE)
        assert output.shape == (1, shape[1], 2, 2) and output.count_nonzero() == 0
        output.sum().backward()
        assert empty.grad.shape == shape


@pytest.mark.parametrize('ratio, aligned', [(0, True), (2, True), (0, False), (2, False)])
def test_coordinates_of_a_diverged_network(device, ratio, aligned):
    """NaN and infinite coordinates pool zeros, reach no memory outside, and leave other RoIs alone."""
    nan, inf = float('nan'), float('inf')
    x = torch.randn(1, 2, 8, 8, device=device)
    good = [0.0, 8, 8, 40, 40]
    bad = [[0.0, nan, 0, 9, 9], [0, 0, 0, nan, nan], [0, -inf, -inf, inf, inf], [0, 3e37, 3e37, 3e38, 3e38]]
    output = roi_align(x, torch.tensor([*bad, good], device=device), 2, SCALE, ratio, aligned)
    assert output[:-1].count_nonzero() == 0
    alone = roi_align(x, torch.tensor([good], device=device), 2, SCALE, ratio, aligned)
    torch.testing.assert_close(output[-1:], alone)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_cpu_gradient_does_not_depend_on_threads(layout):
    rois, grads = make_rois(300), []
    x = torch.randn(2, 50, 20, 30).to(memory_format=layout)
    weight = torch.randn(len(rois), 50, 7, 7)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        (roi_align(leaf, rois, 7, SCALE) * weight).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_errors(device):
    x, rois = torch.randn(1, 2, 8, 8, device=device), torch.zeros(3, 5, device=device)
    for args, error, message in [
            ((x[0], rois, 7, 1.0), ValueError, r'input must be \(N, C, H, W\), got \[2, 8, 8\]'),
            ((x, rois[:, :4], 7, 1.0), ValueError, r'rois must be \(K, 5\) .*, got \[3, 4\]'),
            ((x, rois, 0, 1.0), ValueError, 'output size must be positive, got 0 x 0'),
            ((x, rois, 7, 1.0, -1), ValueError, 'sampling_ratio must be 0 to 4096, got -1'),
            ((x, rois, 7, 1.0, 2**32), ValueError, f'sampling_ratio must be 0 to 4096, got {2**32}'),
            ((x.int(), rois, 7, 1.0), TypeError, 'input must be floating point, got Int'),
            ((x, rois.int(), 7, 1.0), TypeError, 'rois must be floating point, got Int')]:
        with pytest.raises(error, match=message) as caught:
            roi_align(*args)
        assert '\n' not in str(caught.value)

    for features, scales, finest, error, message in [
            ([], [], 56, ValueError, 'at least one level is needed'),
            ([x, x], [1.0], 56, ValueError, '2 levels, but 1 spatial scales'),
            ([x, x[:, :1]], [1.0, 0.5], 56, ValueError, 'differ in images or channels'),
            ([x, x.double()], [1.0, 0.5], 56, TypeError, 'must have one dtype, got Float and Double'),
            ([x, x], [1.0, 0.5], 0.0, ValueError, 'finest_scale must be positive, got 0'),
            ([x, x], [1.0, 0.5], float('nan'), ValueError, 'finest_scale must be positive, got nan'),
            ([x, x], [1.0, 0.5], None, ValueError, '2 levels, but neither the level of each RoI nor')]:
        with pytest.raises(error, match=message) as caught:
            multilevel_roi_align(features, rois, 7, scales, finest_scale=finest)
        assert '\n' not in str(caught.value)
    with pytest.raises(ValueError, match=r'levels must be \(3,\), got \[2\]'):
        multilevel_roi_align([x, x], rois, 7, [1.0, 0.5], levels=torch.zeros(2, device=device).long())
    with pytest.raises(TypeError, match='levels must be int64, got Float'):
        multilevel_roi_align([x, x], rois, 7, [1.0, 0.5], levels=torch.zeros(3, device=device))


@pytest.mark.parametrize('image', [-1.0, 2.0, float('nan')])
def test_image_outside_the_batch(image):
    with pytest.raises(IndexError, match=r'rois\[1\] names image .* of a batch of 2'):
        roi_align(torch.randn(2, 2, 8, 8), torch.tensor([[0.0, 0, 0, 9, 9], [image, 0, 0, 9, 9]]), 7, SCALE)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_opcheck(device, dtype, requires_grad, layout):
    features = [x.detach().requires_grad_(requires_grad) for x in make_pyramid(device, dtype, layout)]
    # A tie-free sum order is not guaranteed by atomics: compare with the tolerance of the dtype.
    close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    rois, levels = make_rois(4)[:4].to(device), torch.tensor([0, 2, 0, 1], device=device)
    op = torch.ops.mmdet.roi_align.default
    torch.library.opcheck(op, (features, rois, None, SCALES, 3, 2, 0, True, 0.5, 32.0), **close)
    torch.library.opcheck(op, (features, rois, levels, SCALES, 3, 2, 0, True, 0.0, None), **close)
    grad = torch.randn(4, 6, 3, 2, device=device).to(dtype)
    sizes, op = [2, 6, 40, 60, 20, 30, 10, 15], torch.ops.mmdet.roi_align_backward.default
    torch.library.opcheck(
        op, (grad, rois, levels, SCALES, sizes, layout == torch.channels_last, 2, True, 0.5, 32.0), **close)


def test_autocast_keeps_coordinates(device):
    """A bfloat16 coordinate near 1,000 would be off by up to two pixels."""
    features = torch.randn(1, 4, 20, 160, device=device).bfloat16()
    rois = torch.tensor([[0, 1001.3, 17.7, 1130.9, 100.1]], device=device)
    expected = roi_align(features.float(), rois, 7, SCALE)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = roi_align(features, rois, 7, SCALE)
        assert roi_align(features.float(), rois, 7, SCALE).dtype == torch.float32
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected.bfloat16())


def pool_and_square(x: Tensor, rois: Tensor) -> Tensor:
    return roi_align(x, rois, 3, SCALE, aligned=False).square()


def test_compile(device):
    x, rois = torch.randn(2, 3, 20, 30, device=device), make_rois().to(device)
    eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(pool_and_square, fullgraph=True, backend='aot_eager', dynamic=True)
    for count in (4, 9):
        expected, output = pool_and_square(eager, rois[:count]), compiled(traced, rois[:count])
        torch.testing.assert_close(output, expected)
        expected.sum().backward()
        output.sum().backward()
    torch.testing.assert_close(traced.grad, eager.grad)


def test_export(device):
    class Pool(torch.nn.Module):
        def forward(self, x: Tensor, rois: Tensor) -> Tensor:
            return pool_and_square(x, rois)

    x, rois = torch.randn(2, 3, 20, 30, device=device), make_rois().to(device)
    program = torch.export.export(Pool(), (x, rois), dynamic_shapes=(None, {0: torch.export.Dim('rois')}))
    assert 'mmdet.roi_align' in str(program.graph)
    torch.testing.assert_close(program.module()(x, rois[:5]), pool_and_square(x, rois[:5]))
