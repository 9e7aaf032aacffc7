"""The block on a GPU, with the signatures of `layers/block.py`: cuBLAS, and one kernel for whatever
lies between two products.

Tokens are rows (B * N, D), heads are (parts, B, H, N, d). All of GPSA's position attention P is
formed, once for all images. What products read is written by the kernels in the type that products
take. Where a block writes its gradients is given, so that they lie in one buffer.
"""

from math import prod

from .... import layers
from ....layers.names import part
from ..attention import is_psa

POSITION_WARPS = 16  # 512 threads, which may take 128 registers each
EPS = 1e-6


class Blocks:
    """The functions that convit_forward asks for, by Kernels for one type and precision."""

    def __init__(self, kernels):
        self.kernels = kernels

    def block_forward(self, x, params, num_heads, grid, keep=(None, None), keep_prob=1.0):
        """As layers.block_forward."""
        x = self.kernels.xp.ascontiguousarray(x)
        factors = [self._factor(mask, keep_prob) for mask in keep]
        weights = self.operands(params)
        return self.forward(x, params, weights, num_heads, grid, factors, x.shape[1])

    def last_block_forward(self, x, params, num_heads, grid, keep=(None, None), keep_prob=1.0):
        """As layers.last_block_forward: beyond keys and values for token 0 alone, in a block that
        has a class token."""
        x = self.kernels.xp.ascontiguousarray(x)
        factors = [self._factor(mask, keep_prob) for mask in keep]
        weights = self.operands(params)
        queries = x.shape[1] if "attn.pos_proj.weight" in params else 1
        y, cache = self.forward(x, params, weights, num_heads, grid, factors, queries)
        return y[:, 0], (cache, y.shape)

    def block_backward(self, dy, cache):
        """As layers.block_backward."""
        params = cache[0]
        xp = self.kernels.xp
        grads = {name: xp.empty(p.shape, p.dtype) for name, p in params.items()}
        return self.backward(xp.ascontiguousarray(dy), cache, grads), grads

    def last_block_backward(self, dy, cache):
        """As layers.last_block_backward."""
        cache, shape = cache
        return self.block_backward(self.first_tokens(dy, shape), cache)

    def first_tokens(self, dy, shape):
        """dy (B, D) at token 0 of `shape` (B, N, D), the rest 0."""
        if shape[1] == 1:
            return dy.reshape(shape)
        dtokens = self.kernels.xp.zeros(shape, dy.dtype)
        dtokens[:, 0] = dy
        return dtokens

    def _factor(self, keep, keep_prob):
        return None if keep is None else keep.astype(self.kernels.dtype) / keep_prob

    def operands(self, params):
        """The matrices among params, in the type that products read."""
        if self.kernels.operand is self.kernels.dtype:
            return params
        return {name: self.operand(p) for name, p in params.items() if p.ndim == 2}

    def operand(self, x, factor=None):
        """factor x in the type that products read; factor: None, or one number for each image."""
        k = self.kernels
        if factor is None and k.operand is k.dtype:
            return x
        rows, D = prod(x.shape[:-1]), x.shape[-1]
        tokens = 1 if factor is None else rows // len(factor)
        out = k.empty_operand(*x.shape)
        k.rows("scale", rows, x, factor, out, rows, tokens, D)
        return out

    # ------------------------------------------------------------ LayerNorm and residuals

    def add_norm(self, x, y=None, ybias=None, factor=None, norm=None):
        """x + factor (y + ybias), or x alone, and its LayerNorm. Returns the sum, the normed rows
        as an operand, and the statistics for norm_backward."""
        k, D = self.kernels, x.shape[-1]
        rows = prod(x.shape[:-1])
        total = x if y is None else k.empty(*x.shape)
        normed, mean, rstd, weight, bias = None, None, None, None, None
        if norm is not None:
            normed, mean, rstd = k.empty_operand(*x.shape), k.empty(rows), k.empty(rows)
            weight, bias = norm
        tokens = 1 if factor is None else rows // len(factor)
        k.rows("add_norm", rows, x, y, ybias, factor, total, weight, bias, normed, mean, rstd,
               rows, tokens, D, EPS)  # fmt: skip
        return total, normed, (total, mean, rstd, weight)

    def norm_backward(self, dy, cache, grads, residual=None, factor=None, needs_operand=False):
        """dx = residual + what comes through the LayerNorm, and factor dx as an operand, or None.

        residual: like dx, or (B, 1, D) of first tokens. grads: where dweight and dbias go.
        """
        k, (x, mean, rstd, weight) = self.kernels, cache
        D, rows = x.shape[-1], prod(x.shape[:-1])
        every = 1 if residual is None else rows * D // residual.size
        tokens = 1 if factor is None else rows // len(factor)
        dx = k.empty(*x.shape)
        is_separate = needs_operand and (factor is not None or k.operand is not k.dtype)
        operand = k.empty_operand(*x.shape) if is_separate else None
        warps, shared = k.warps(2 * D)
        blocks = min(-(-rows // warps), 512)
        sums = k.empty(blocks, 2 * D)
        k.launch("norm_backward", blocks, dy, x, mean, rstd, weight, residual, factor, dx, operand,
                 sums, rows, tokens, every, D, warps=warps, shared=shared)  # fmt: skip
        for part_of, out in zip((sums[:, :D], sums[:, D:]), grads, strict=True):
            k.sum_rows(part_of, out)
        return dx, operand if is_separate else dx

    # ------------------------------------------------------------ heads

    def split(self, x, shape, biases=(None, None)):
        """x (B * N, parts * D) + biases as heads of `shape` (parts, B, H, N, d), an operand."""
        parts, B, H, N, d = shape
        out, (first, second) = self.kernels.empty_operand(*shape), biases
        width = 0 if first is None else first.size
        self.kernels.rows(
            "split", B * N, x, first, second, out, B * N, N, parts, H, d, width
        )  # fmt: skip
        return out

    def merge(self, heads):
        """The inverse: heads (parts, B, H, N, d) as rows (B * N, parts * D), an operand."""
        parts, B, H, N, d = heads.shape
        if parts == N == 1 and self.kernels.operand is self.kernels.dtype:
            return heads.reshape(B, H * d)
        out = self.kernels.empty_operand(B * N, parts * H * d)
        self.kernels.rows("merge", B * N, heads, out, B * N, N, parts, H, d)
        return out

    # ------------------------------------------------------------ attention

    def attention_forward(self, x, params, weights, num_heads, grid, queries):
        """proj(attention) without proj's bias, for the first `queries` tokens: (B * queries, D).

        x (B, N, D), an operand; params and weights: the attention's, weights as operands.
        """
        k, (B, N, D) = self.kernels, x.shape
        H, rows = num_heads, x.reshape(-1, D)
        has_gate = "gating_param" in params
        projected = k.empty(B * N, 3 * D)
        for weight, columns in self._projections(weights, D):
            k.product(rows, weight.T, out=projected[:, columns])
        biases = params.get("qkv.bias", params.get("qk.bias")), params.get("v.bias")
        heads = self.split(projected, (3, B, H, N, D // H), biases)
        q, key, v = heads[0][:, :, :queries], heads[1], heads[2]
        del projected
        scores = k.product(q, key.swapaxes(-1, -2), alpha=(D // H) ** -0.5)  # (B, H, queries, N)
        is_in_place = k.operand is k.dtype
        C = scores if is_in_place else k.empty_operand(*scores.shape)
        A, P = C, None
        if has_gate:
            A, P = k.empty_operand(*scores.shape), k.empty(H, N, N)
            k.rows("positions", H * N, params["pos_proj.weight"], P, H, *grid)
        count = B * H * queries
        gating = params.get("gating_param")
        k.rows("softmax", count, scores, P, gating, C, A, count, H, queries, N)
        merged = self.merge(k.product(A, v)[None])  # (B * queries, D)
        out = k.product(merged, weights["proj.weight"].T)
        return out, (rows, heads, C, A, P, merged, grid)

    def attention_backward(self, dout, cache, params, weights, grads):
        """dout (B * queries, D), an operand. Returns dx (B * N, D); grads are written."""
        k, (rows, heads, C, A, P, merged, grid) = self.kernels, cache
        _, B, H, N, d = heads.shape
        queries, D, scale = C.shape[2], H * d, d**-0.5
        q, key, v = heads[0][:, :, :queries], heads[1], heads[2]
        self.linear_backward(dout, merged, grads, "proj")
        dmerged = k.product(dout, weights["proj.weight"])
        dy = self.split(dmerged, (1, B, H, queries, d))[0]
        del dmerged
        make = k.empty if queries == N else lambda *shape: k.xp.zeros(shape, k.dtype)
        dheads = make(3, B, H, N, d)
        k.product(A.swapaxes(-1, -2), dy, out=dheads[2])
        dA = k.product(dy, v.swapaxes(-1, -2))
        dS = dA if k.operand is k.dtype else k.empty_operand(*dA.shape)
        gating, dA_sum, rho = params.get("gating_param"), None, None
        if P is not None:
            dA_sum, rho = k.empty(H, N, N), k.empty(H, N)
        warps, shared = k.warps(N + 1)
        k.launch("softmax_backward", H * queries, dA, C, gating, dS, dA_sum, rho, B, H, queries, N,
                 warps=warps, shared=shared)  # fmt: skip
        del dA
        k.product(dS, key, out=dheads[0][:, :, :queries], alpha=scale)
        k.product(dS.swapaxes(-1, -2), q, out=dheads[1], alpha=scale)
        if P is not None:
            shared = POSITION_WARPS * 4 * dA_sum.dtype.itemsize
            k.launch("positions_backward", H, dA_sum, P, rho, gating, grads["pos_proj.weight"],
                     grads["pos_proj.bias"], grads["gating_param"], H, *grid, warps=POSITION_WARPS,
                     shared=shared)  # fmt: skip
        drows = self.merge(dheads)  # (B * N, 3D)
        dx = k.empty(B * N, D)
        names = ("qk", "v") if "qk.weight" in params else ("qkv",)
        for name, (weight, columns) in zip(names, self._projections(weights, D), strict=True):
            part_of = drows[:, columns]
            self.linear_backward(part_of, rows, grads, name)
            k.product(part_of, weight, out=dx, add=name == "v")
        return dx

    def _projections(self, weights, D):
        """The weights that make q, k and v, each with its columns among theirs."""
        if "qkv.weight" in weights:
            return [(weights["qkv.weight"], slice(0, 3 * D))]
        return [
            (weights["qk.weight"], slice(0, 2 * D)),
            (weights["v.weight"], slice(2 * D, 3 * D)),
        ]

    def linear_backward(self, dy, x, grads, name):
        """dW = dy^T x and, where it has one, db = the sum of dy's rows, into grads."""
        self.kernels.product(dy.T, x, out=grads[f"{name}.weight"])
        if f"{name}.bias" in grads:
            self.kernels.sum_rows(dy, grads[f"{name}.bias"])

    # ------------------------------------------------------------ the block

    def forward(self, x, params, weights, num_heads, grid, factors, queries):
        """The block for the first `queries` tokens: (B, queries, D).

        weights: params as operands; factors: what the branches are multiplied by, (B,) each, or
        None.
        """
        k, (_, N, D) = self.kernels, x.shape
        attn, mlp = part(params, "attn."), part(params, "mlp.")
        if is_psa(params):
            y, cache = layers.block_forward(x, params, num_heads, grid, factors)
            return y, (params, None, cache, None)
        attn_weights, mlp_weights = part(weights, "attn."), part(weights, "mlp.")
        norms = [(params[f"norm{i}.weight"], params[f"norm{i}.bias"]) for i in (1, 2)]
        _, normed, statistics1 = self.add_norm(x, norm=norms[0])
        y, cache_attn = self.attention_forward(normed, attn, attn_weights, num_heads, grid, queries)
        start = x if queries == N else x[:, :queries].copy()
        x, normed, statistics2 = self.add_norm(start, y, attn["proj.bias"], factors[0], norms[1])
        normed = normed.reshape(-1, D)
        hidden = k.product(normed, mlp_weights["fc1.weight"].T)  # (B * queries, M)
        active = k.empty_operand(*hidden.shape)
        k.rows("gelu", len(hidden), hidden, mlp["fc1.bias"], active, *hidden.shape)
        y = k.product(active, mlp_weights["fc2.weight"].T)
        out, _, _ = self.add_norm(x, y, mlp["fc2.bias"], factors[1])
        caches = statistics1, cache_attn, statistics2, (normed, hidden, active)
        return out, (params, weights, caches, factors)

    def backward(self, dy, cache, grads):
        """dy (B, queries, D). Returns dx (B, N, D); grads, under params' keys, are written."""
        params, weights, caches, factors = cache
        if is_psa(params):
            dx, found = layers.block_backward(dy, caches)
            for name, grad in found.items():
                grads[name][...] = grad
            return dx
        statistics1, cache_attn, statistics2, (normed, hidden, active) = caches
        k = self.kernels
        shape, D = statistics1[0].shape, dy.shape[-1]
        mlp, mlp_weights, dmlp = (part(x, "mlp.") for x in (params, weights, grads))
        attn, attn_weights, dattn = (part(x, "attn.") for x in (params, weights, grads))
        dnorms = [(grads[f"norm{i}.weight"], grads[f"norm{i}.bias"]) for i in (1, 2)]
        dbranch = self.operand(dy, factors[1]).reshape(-1, D)
        self.linear_backward(dbranch, active, dmlp, "fc2")
        dactive = k.product(dbranch, mlp_weights["fc2.weight"])
        dhidden = dactive if k.operand is k.dtype else k.empty_operand(*dactive.shape)
        k.rows("gelu_backward", len(hidden), dactive, hidden, mlp["fc1.bias"], dhidden,
               *hidden.shape)  # fmt: skip
        self.linear_backward(dhidden, normed, dmlp, "fc1")
        dnormed = k.product(dhidden, mlp_weights["fc1.weight"])
        dx, dbranch = self.norm_backward(
            dnormed, statistics2, dnorms[1], dy, factors[0], needs_operand=True
        )
        dbranch = dbranch.reshape(-1, D)
        dnormed = self.attention_backward(dbranch, cache_attn, attn, attn_weights, dattn)
        dx, _ = self.norm_backward(dnormed, statistics1, dnorms[0], dx)
        return dx.reshape(shape)
