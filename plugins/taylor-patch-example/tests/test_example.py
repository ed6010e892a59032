"""The contract of taylor_patch, held against the backend."""

import torch
from taylor_patch_example import chunked

from taylor_patch.testing import conformance
from taylor_patch.testing.cases import LAYOUTS, changed, exact, make_call, relative_error

TestConformance = conformance("taylor_patch_example:Plugin", "chunked")


def test_chunks_join(monkeypatch):
    monkeypatch.setattr(chunked, "ROWS", 50)
    call = make_call(64, torch.float32, "cpu")
    assert call.q.shape[2] > 3 * 50 and relative_error(chunked.Chunked().run(call), exact(call)) < 1e-5


def test_pytorch_gets_aligned_rows(monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention

    def checked(q, k, v, **kwargs):
        assert all(x.data_ptr() % 16 == 0 for x in (q, k, v))
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", checked)
    call = changed(make_call(64, torch.float32, "cpu"), LAYOUTS["data that is not aligned"])
    assert relative_error(chunked.Chunked().run(call), exact(call)) < 1e-5
