"""`kernels.tree_attention` by the textbook, on a CPU: what the kernel is tested against, and what the sampler is tested
with where Triton's interpreter would take minutes."""

import ctypes

import torch


def memory(address, rows, width, dtype):
    """What is in memory at `address`, as a tensor [rows, width]."""
    raw = (ctypes.c_char * (rows * width * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(rows, width)


def tree_attention(query, kv, spans, positions, layer, scale):
    (_, heads, d), kv_heads = query.shape, kv.shape[1] // 2
    out = torch.empty_like(query)
    for r, (row, position) in enumerate(zip(spans.tolist(), positions.tolist(), strict=True)):
        ends = [min(first, position + 1) for first, *_ in row[1:]] + [position + 1]
        for j in range(kv_heads):
            parts = []
            for (first, address, stride, apart), end in zip(row, ends, strict=True):
                if first < end:
                    at = address + 2 * layer * apart + j * stride
                    parts.append([memory(begin, end - first, d, kv.dtype) for begin in (at, at + apart)])
            parts[-1][0][-1], parts[-1][1][-1] = kv[r, j], kv[r, kv_heads + j]
            keys, values = (torch.cat(column).double() for column in zip(*parts, strict=True))
            group = slice(j * heads // kv_heads, (j + 1) * heads // kv_heads)
            out[r, group] = ((query[r, group].double() @ keys.T * scale).softmax(-1) @ values).to(out.dtype)
    return out
