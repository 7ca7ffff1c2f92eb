"""Inner products and norms against numpy."""

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from gac_plugin import tensors

SHAPES = [(), (3,), (2, 3), (2, 1, 3, 2)]
BATCHES = [(4,), (4, 3), (4, 2, 3), (4, 2, 3, 2)]


def draw(shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_inner_sums_the_products_over_all_tensors():
    a, b = draw(SHAPES), draw(SHAPES)
    parts = [float((x.numpy() * y.numpy()).sum()) for x, y in zip(a, b, strict=True)]
    assert [float(part) for part in tensors.inner_parts(a, b)] == pytest.approx(parts, rel=1e-13)
    assert float(tensors.inner(a, b)) == pytest.approx(sum(parts), rel=1e-13)
    assert tensors.inner(a, b).shape == ()


def test_inner_reads_tensors_that_are_not_contiguous():
    a, b = torch.randn(3, 5), torch.randn(5, 3)
    assert float(tensors.inner([a.mT], [b])) == pytest.approx(float((a.mT * b).sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inner_products_of_half_precision_accumulate_in_float32(dtype):
    ones = torch.ones(4096, dtype=dtype)
    product = tensors.inner([ones], [1.0 * ones])
    assert product.dtype == torch.float32
    assert float(product) == 4096.0
    large = torch.full((4,), 300.0, dtype=dtype)  # 300^2 overflows float16
    assert float(tensors.inner([large], [large])) == pytest.approx(4 * float(large[0]) ** 2)


def test_lists_of_different_length_are_an_error():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        tensors.inner(draw(SHAPES), draw(SHAPES[:-1]))


@pytest.mark.parametrize("shape", BATCHES)
def test_per_sample_reductions_run_over_everything_but_the_batch(shape):
    a, b = draw([shape, shape])
    rows, others = a.numpy().reshape(4, -1), b.numpy().reshape(4, -1)
    np.testing.assert_allclose(tensors.per_sample_inner(a, b), (rows * others).sum(1), rtol=1e-13)
    np.testing.assert_allclose(tensors.per_sample_norm(a), np.sqrt((rows**2).sum(1)), rtol=1e-13)
    np.testing.assert_allclose(tensors.per_sample_mean(a), rows.mean(1), rtol=1e-13)


@pytest.mark.parametrize("shape", BATCHES)
def test_scale_samples_multiplies_each_sample_by_its_own_number(shape):
    scale, a = draw([(4,), shape])
    expected = np.stack([s * x for s, x in zip(scale.numpy(), a.numpy(), strict=True)])
    np.testing.assert_array_equal(tensors.scale_samples(scale, a), expected)


@pytest.fixture
def mesh(tmp_path):
    """This process alone, as a mesh of the two dimensions that copies and shards have."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
    torch.distributed.destroy_process_group()


def test_inner_products_and_copies_of_dtensors_are_those_of_plain_ones_of_any_layout_and_type(mesh):
    """In several processes: test_sharded.py."""
    layouts = [Replicate(), Shard(0)], [Replicate(), Replicate()], [Replicate(), Shard(0)]
    plain = [torch.randn(3, 5), torch.randn(4, dtype=torch.float64), torch.randn(7).bfloat16()]
    sharded = [distribute_tensor(x, mesh, layout) for x, layout in zip(plain, layouts, strict=True)]
    mixed = [*sharded, torch.randn(2)]
    products = tensors.inner_parts(mixed, mixed)
    expected = tensors.inner_parts([*plain, mixed[-1]], [*plain, mixed[-1]])
    assert [type(product) for product in products] == [torch.Tensor] * 4
    torch.testing.assert_close(products, expected, rtol=1e-6, atol=0)
    targets = [torch.zeros_like(x) for x in mixed]
    tensors.copy_(targets, mixed)
    assert all(torch.equal(a.full_tensor(), b) for a, b in zip(targets[:-1], plain, strict=True))
    assert torch.equal(targets[-1], mixed[-1])


def test_a_function_of_the_whole_keeps_the_layout(mesh):
    x = torch.randn(3, 5)
    sharded = distribute_tensor(x, mesh, [Replicate(), Shard(0)])
    result = tensors.on_whole(torch.exp, sharded)
    assert result.placements == sharded.placements
    assert torch.equal(result.full_tensor(), x.exp())
    assert torch.equal(tensors.on_whole(torch.exp, x), x.exp())
