"""ConViT in one file: forward pass, every gradient by hand, AdamW and a training, in NumPy.

A vision transformer cuts an image into patches, makes a vector (a token) of each, and lets tokens
look at each other. In ConViT (d'Ascoli et al. 2021) the first blocks are told where to look. Each
head starts as one soft tap of a convolution's kernel, and a gate learns how far to leave it.
Every layer is a pair: y, cache = x_forward(...) and x_backward(dy, cache), where dy means dL/dy.
Run `python examples/convit_in_one_file.py`. It takes a good two minutes of one processor core;
where others use the cores too, put OPENBLAS_NUM_THREADS=1 before it. The loss stays at 2.3, that of
guessing, for 100 steps. It rests at 1.2, with 30 % of the unseen images right, when the network
knows the texture but not its place. Then it falls below 0.1, and more than 99 % are right.
"""

import time
from math import cos, pi

import numpy as np
from scipy.special import erf

from miniconvit.data import load_dataset

PATCH = 4  # pixels: an image of 32 x 32 is a grid of 8 x 8 patches
WIDTH = 48  # D, the length of a token
HEADS = 4  # H, each of d = D / H features; a square number, for the k x k offsets
HIDDEN = 4 * WIDTH  # M, inside the MLP
DEPTH = 4  # blocks
GPSA = 3  # the first so many are gated positional self-attention, the rest plain
EPOCHS, BATCH, PEAK, DECAY = 4, 32, 2e-3, 0.05  # PEAK: of the learning rate; DECAY: of weights
# In shapes: B images, N tokens, R = B N rows, C, P, A (B, H, N, N) attention: a row per query.


def linear_forward(x, weight, bias=0):
    """y = x W^T + b, one product for all tokens.  x (..., in), weight (out, in), bias (out,)."""
    rows = x.reshape(-1, x.shape[-1])  # (R, in)
    y = rows @ weight.T + bias  # (R, out)
    return y.reshape(*x.shape[:-1], -1), (rows, weight)


def linear_backward(dy, cache):
    """(1) dx = dy W.  (2) dW = dy^T x.  (3) db = the sum of dy over the rows."""
    rows, weight = cache
    drows = dy.reshape(-1, dy.shape[-1])  # (R, out)
    dx = drows @ weight  # (1) (R, in)
    dweight = drows.T @ rows  # (2) (out, in)
    dbias = drows.sum(axis=0)  # (3) (out,)
    return dx.reshape(*dy.shape[:-1], -1), dweight, dbias


def layernorm_forward(x, weight, bias, eps=1e-6):
    """y = weight * xhat + bias,  xhat = (x - mean) / sqrt(variance + eps) of each token (D,)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)  # (..., 1)
    xhat = centred * rstd
    return xhat * weight + bias, (xhat, rstd, weight)


def layernorm_backward(dy, cache):
    """dx = rstd * (dxhat - (1) - (2)): x moves xhat, and also the mean (1) and the variance (2)."""
    xhat, rstd, weight = cache
    rows = tuple(range(dy.ndim - 1))
    dweight, dbias = (dy * xhat).sum(axis=rows), dy.sum(axis=rows)
    dxhat = dy * weight
    through_mean = dxhat.mean(axis=-1, keepdims=True)  # (1)
    through_variance = xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)  # (2)
    return rstd * (dxhat - through_mean - through_variance), dweight, dbias


def gelu_forward(x):
    """y = x Phi(x),  Phi(x) = (1 + erf(x / sqrt 2)) / 2: a ReLU with a smooth bend."""
    Phi = 0.5 * (1 + erf(x * 0.5**0.5))
    return x * Phi, (x, Phi)


def gelu_backward(dy, cache):
    """dx = dy * (Phi(x) + x phi(x)),  phi = Phi' = exp(-x^2 / 2) / sqrt(2 pi)."""
    x, Phi = cache
    phi = np.exp(-0.5 * x * x) * (2 * pi) ** -0.5
    return dy * (Phi + x * phi)


def mlp_forward(x, params):
    """y = fc2(gelu(fc1(x))): each token by itself.  x (B, N, D)."""
    hidden, cache1 = linear_forward(x, params["fc1.weight"], params["fc1.bias"])  # (B, N, M)
    active, cache_gelu = gelu_forward(hidden)
    y, cache2 = linear_forward(active, params["fc2.weight"], params["fc2.bias"])  # (B, N, D)
    return y, (cache1, cache_gelu, cache2)


def mlp_backward(dy, cache):
    """The three in reverse. Returns dx and the gradients under the parameters' names."""
    cache1, cache_gelu, cache2 = cache
    grads = {}
    dactive, grads["fc2.weight"], grads["fc2.bias"] = linear_backward(dy, cache2)  # (B, N, M)
    dhidden = gelu_backward(dactive, cache_gelu)
    dx, grads["fc1.weight"], grads["fc1.bias"] = linear_backward(dhidden, cache1)  # (B, N, D)
    return dx, grads


def softmax_forward(x):
    """y_i = exp(x_i) / sum_j exp(x_j) over the last axis; the maximum only tames exp."""
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return y, y


def softmax_backward(dy, cache):
    """dx_i = y_i (dy_i - sum_j dy_j y_j): raising one score lowers all other weights."""
    y = cache
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


def split_heads(x, parts, num_heads):
    """Cuts the features, ordered (part, head, d), into heads.  x (B, N, parts * D)."""
    B, N, _ = x.shape
    return x.reshape(B, N, parts, num_heads, -1).transpose(2, 0, 3, 1, 4)  # (parts, B, H, N, d)


def merge_heads(*parts):
    """The inverse of split_heads, and so its backward pass."""
    B, _, N, _ = parts[0].shape
    return np.stack(parts).transpose(1, 3, 0, 2, 4).reshape(B, N, -1)  # (B, N, parts * D)


def content_forward(q, k):
    """C = softmax(q k^T / sqrt d): look where the key matches the query.  q, k (B, H, N, d)."""
    scale = q.shape[-1] ** -0.5
    scaled = q * scale
    C, cache = softmax_forward(scaled @ k.swapaxes(-1, -2))  # (B, H, N, N)
    return C, (cache, scaled, k, scale)


def content_backward(dC, cache):
    """With dS the gradient of the scores: (1) dq = dS k / sqrt d.  (2) dk = dS^T q / sqrt d."""
    cache_softmax, scaled, k, scale = cache
    dS = softmax_backward(dC, cache_softmax)  # (B, H, N, N)
    dq = (dS @ k) * scale  # (1) (B, H, N, d)
    dk = dS.swapaxes(-1, -2) @ scaled  # (2) (B, H, N, d); scaled is q / sqrt d
    return dq, dk


def mhsa_forward(x, params, num_heads):
    """Plain self-attention: y = proj(C v), with q, k and v linear in x.  x (B, N, D)."""
    qkv, cache_qkv = linear_forward(x, params["qkv.weight"])  # (B, N, 3D)
    q, k, v = split_heads(qkv, 3, num_heads)  # (B, H, N, d) each
    C, cache_content = content_forward(q, k)  # (B, H, N, N)
    merged = merge_heads(C @ v)  # (B, N, D)
    y, cache_proj = linear_forward(merged, params["proj.weight"], params["proj.bias"])
    return y, (cache_qkv, cache_content, cache_proj, C, v)


def mhsa_backward(dy, cache):
    """For o = C v: (1) dv = C^T do.  (2) dC = do v^T. Returns dx and the gradients by name."""
    cache_qkv, cache_content, cache_proj, C, v = cache
    grads = {}
    dmerged, grads["proj.weight"], grads["proj.bias"] = linear_backward(dy, cache_proj)
    (do,) = split_heads(dmerged, 1, C.shape[1])  # (B, H, N, d)
    dv = C.swapaxes(-1, -2) @ do  # (1) (B, H, N, d)
    dC = do @ v.swapaxes(-1, -2)  # (2) (B, H, N, N)
    dq, dk = content_backward(dC, cache_content)
    dqkv = merge_heads(dq, dk, dv)  # (B, N, 3D)
    dx, grads["qkv.weight"], _ = linear_backward(dqkv, cache_qkv)  # (B, N, D)
    return dx, grads


def position_forward(weight, bias, grid):
    """P = softmax(R w + b),  R = (dx, dy, dx^2 + dy^2), key minus query: look at one offset.

    With w = s (2 cx, 2 cy, -1) the score is -s |offset - centre|^2 and a constant: one soft tap.
    weight (H, 3), bias (H,), grid (rows, cols). Returns P (H, N, N).
    """
    row, col = np.divmod(np.arange(grid[0] * grid[1]), grid[1])  # (N,) each
    dx, dy = col - col[:, None], row - row[:, None]  # (N, N) each: offsets, no gradients
    R = np.stack([dx, dy, dx * dx + dy * dy], axis=-1).astype(weight.dtype)  # (N, N, 3)
    P, cache = softmax_forward((R @ weight.T + bias).transpose(2, 0, 1))  # (H, N, N)
    return P, (cache, R)


def position_backward(dP, cache):
    """(1) dw = sum over queries and keys of dS R.  (2) db = 0, as b moves all keys alike."""
    cache_softmax, R = cache
    dS = softmax_backward(dP, cache_softmax)  # (H, N, N)
    dweight = dS.reshape(len(dS), -1) @ R.reshape(-1, 3)  # (1) (H, 3)
    return dweight, np.zeros_like(dweight[:, 0])  # (2) (H,)


def gate_forward(C, P, gating_param):
    """A = (1 - g) C + g P,  g = sigmoid(gating_param): content or position, head by head.

    C (B, H, N, N), P (H, N, N), gating_param (H,). Returns A (B, H, N, N).
    """
    g = (1 / (1 + np.exp(-gating_param)))[:, None, None]  # (H, 1, 1)
    return (1 - g) * C + g * P, (C, P, g)


def gate_backward(dA, cache):
    """(1) dC = (1 - g) dA.  (2) dP = g sum_b dA, since all images share P.
    (3) dgating_param = g (1 - g) sum dA (P - C)."""
    C, P, g = cache
    over_images = dA.sum(axis=0)  # (H, N, N)
    dC = (1 - g) * dA  # (1) (B, H, N, N)
    dP = g * over_images  # (2) (H, N, N)
    dg = (over_images * P).sum(axis=(1, 2)) - (dA * C).sum(axis=(0, 2, 3))  # (H,)
    g = g[:, 0, 0]
    return dC, dP, g * (1 - g) * dg  # (3) (H,)


def gpsa_forward(x, params, num_heads, grid):
    """Gated positional self-attention: y = proj(A v), A mixed from two maps.  x (B, N, D)."""
    qk, cache_qk = linear_forward(x, params["qk.weight"])  # (B, N, 2D)
    values, cache_v = linear_forward(x, params["v.weight"])  # (B, N, D)
    q, k = split_heads(qk, 2, num_heads)  # (B, H, N, d) each
    (v,) = split_heads(values, 1, num_heads)
    C, cache_content = content_forward(q, k)  # (B, H, N, N)
    P, cache_position = position_forward(params["pos_proj.weight"], params["pos_proj.bias"], grid)
    A, cache_gate = gate_forward(C, P, params["gating_param"])  # (B, H, N, N)
    merged = merge_heads(A @ v)  # (B, N, D)
    y, cache_proj = linear_forward(merged, params["proj.weight"], params["proj.bias"])
    return y, (cache_qk, cache_v, cache_content, cache_position, cache_gate, cache_proj, A, v)


def gpsa_backward(dy, cache):
    """As mhsa_backward, with A for C; the gate then splits dA between the two maps."""
    cache_qk, cache_v, cache_content, cache_position, cache_gate, cache_proj, A, v = cache
    grads = {}
    dmerged, grads["proj.weight"], grads["proj.bias"] = linear_backward(dy, cache_proj)
    (do,) = split_heads(dmerged, 1, A.shape[1])  # (B, H, N, d)
    dv = A.swapaxes(-1, -2) @ do  # (B, H, N, d)
    dA = do @ v.swapaxes(-1, -2)  # (B, H, N, N)
    dC, dP, grads["gating_param"] = gate_backward(dA, cache_gate)
    grads["pos_proj.weight"], grads["pos_proj.bias"] = position_backward(dP, cache_position)
    dq, dk = content_backward(dC, cache_content)
    dx_qk, grads["qk.weight"], _ = linear_backward(merge_heads(dq, dk), cache_qk)
    dx_v, grads["v.weight"], _ = linear_backward(merge_heads(dv), cache_v)
    return dx_qk + dx_v, grads  # x went into both, so what comes back is added


def part(params, prefix):
    """The entries below a prefix, without it: part({"mlp.a": 1}, "mlp.") is {"a": 1}."""
    return {name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}


def prefixed(params, prefix):
    """The inverse of part."""
    return {prefix + name: p for name, p in params.items()}


def block_forward(x, params, num_heads, grid):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); gating_param tells GPSA.  x (B, N, D)."""
    attn = part(params, "attn.")
    normed, cache_norm1 = layernorm_forward(x, params["norm1.weight"], params["norm1.bias"])
    if "gating_param" in attn:
        y, cache_attn = gpsa_forward(normed, attn, num_heads, grid)
    else:
        y, cache_attn = mhsa_forward(normed, attn, num_heads)
    x = x + y
    normed, cache_norm2 = layernorm_forward(x, params["norm2.weight"], params["norm2.bias"])
    y, cache_mlp = mlp_forward(normed, part(params, "mlp."))
    return x + y, (cache_norm1, cache_attn, cache_norm2, cache_mlp, "gating_param" in attn)


def block_backward(dy, cache):
    """Where forward adds, the gradient goes both ways: dx = dy + what the branch sends back."""
    cache_norm1, cache_attn, cache_norm2, cache_mlp, is_gpsa = cache
    grads = {}
    dnormed, dmlp = mlp_backward(dy, cache_mlp)
    dx, grads["norm2.weight"], grads["norm2.bias"] = layernorm_backward(dnormed, cache_norm2)
    dy = dy + dx
    dnormed, dattn = (gpsa_backward if is_gpsa else mhsa_backward)(dy, cache_attn)
    dx, grads["norm1.weight"], grads["norm1.bias"] = layernorm_backward(dnormed, cache_norm1)
    return dy + dx, grads | prefixed(dattn, "attn.") | prefixed(dmlp, "mlp.")


def cut_patches(images, height, width):
    """(B, channels, rows * height, cols * width) -> (B, N, channels * height * width)."""
    B, channels, H, W = images.shape
    x = images.reshape(B, channels, H // height, height, W // width, width)
    x = x.transpose(0, 2, 4, 1, 3, 5)  # (B, rows, cols, channels, height, width)
    return x.reshape(B, -1, channels * height * width)


def convit_forward(images, params, depth, num_gpsa, num_heads):
    """logits = head(norm(class token)), which joins the patches after the GPSA blocks.

    images (B, channels, height, width); num_gpsa < depth. Returns logits (B, classes).
    """
    weight, bias = params["patch_embed.proj.weight"], params["patch_embed.proj.bias"]
    D, _, height, width = weight.shape
    grid = images.shape[2] // height, images.shape[3] // width
    patches = cut_patches(images, height, width)  # (B, N, channels * height * width)
    x, cache_patch = linear_forward(patches, weight.reshape(D, -1), bias)  # (B, N, D)
    x = x + params["pos_embed"]  # (1, N, D)
    caches = []
    for i in range(depth):
        if i == num_gpsa:
            cls_token = np.repeat(params["cls_token"], len(x), axis=0)  # (B, 1, D)
            x = np.concatenate([cls_token, x], axis=1)  # (B, 1 + N, D)
        x, cache = block_forward(x, part(params, f"blocks.{i}."), num_heads, grid)
        caches.append(cache)
    token, cache_norm = layernorm_forward(x[:, 0], params["norm.weight"], params["norm.bias"])
    logits, cache_head = linear_forward(token, params["head.weight"], params["head.bias"])
    return logits, (cache_patch, caches, cache_norm, cache_head, x.shape, weight.shape, num_gpsa)


def convit_backward(dlogits, cache):
    """Every layer in reverse. Returns the gradient of each parameter under its name."""
    cache_patch, caches, cache_norm, cache_head, shape, patch_shape, num_gpsa = cache
    grads = {}
    dtoken, grads["head.weight"], grads["head.bias"] = linear_backward(dlogits, cache_head)
    dtoken, grads["norm.weight"], grads["norm.bias"] = layernorm_backward(dtoken, cache_norm)
    dx = np.zeros(shape, dlogits.dtype)  # (B, 1 + N, D)
    dx[:, 0] = dtoken  # the head reads the class token alone
    for i in reversed(range(len(caches))):
        dx, dblock = block_backward(dx, caches[i])
        grads |= prefixed(dblock, f"blocks.{i}.")
        if i == num_gpsa:
            grads["cls_token"] = dx[:, :1].sum(axis=0, keepdims=True)  # (1, 1, D)
            dx = dx[:, 1:]  # (B, N, D)
    grads["pos_embed"] = dx.sum(axis=0, keepdims=True)  # (1, N, D)
    _, dweight, grads["patch_embed.proj.bias"] = linear_backward(dx, cache_patch)
    grads["patch_embed.proj.weight"] = dweight.reshape(patch_shape)
    return grads


def cross_entropy_forward(logits, labels):
    """loss = mean of -log p[label],  p = softmax(logits).  logits (B, classes), labels (B,)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels].mean(), (log_p, labels)


def cross_entropy_backward(dloss, cache):
    """dlogits = dloss (p - t) / B, where t is 1 at the label and 0 elsewhere."""
    log_p, labels = cache
    dlogits = np.exp(log_p)
    dlogits[np.arange(len(labels)), labels] -= 1
    return dlogits * (dloss / len(labels))


def param_shapes(patch_shape, num_patches, M, H, depth, num_gpsa, num_classes):
    """Name to shape, as in official checkpoints.  patch_shape (D, channels, height, width)."""
    D = patch_shape[0]
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, num_patches, D)}
    shapes |= {"patch_embed.proj.weight": patch_shape, "patch_embed.proj.bias": (D,)}
    gpsa = {"gating_param": (H,), "qk.weight": (2 * D, D), "v.weight": (D, D)}
    proj = {"proj.weight": (D, D), "proj.bias": (D,)}
    gpsa |= proj | {"pos_proj.weight": (H, 3), "pos_proj.bias": (H,)}
    mhsa = {"qkv.weight": (3 * D, D)} | proj
    norm = {"weight": (D,), "bias": (D,)}
    mlp = {"fc1.weight": (M, D), "fc1.bias": (M,), "fc2.weight": (D, M), "fc2.bias": (D,)}
    for i in range(depth):
        attn = gpsa if i < num_gpsa else mhsa
        block = prefixed(norm, "norm1.") | prefixed(attn, "attn.")
        block |= prefixed(norm, "norm2.") | prefixed(mlp, "mlp.")
        shapes |= prefixed(block, f"blocks.{i}.")
    head = {"weight": (num_classes, D), "bias": (num_classes,)}
    return shapes | prefixed(norm, "norm.") | prefixed(head, "head.")


def init_params(shapes, seed=0):
    """Small random weights, but GPSA begins as a soft convolution: v copies, position says where.

    Head h looks at the h-th of k x k offsets, column by column, with k = sqrt(H).
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        if name.startswith("patch_embed."):
            bound = np.prod(shapes["patch_embed.proj.weight"][1:]) ** -0.5
            value = rng.uniform(-bound, bound, shape)
        elif name.endswith("pos_proj.weight"):
            k = round(shape[0] ** 0.5)
            cx, cy = np.array(np.divmod(np.arange(k * k), k)) - (k - 1) / 2  # (H,) each
            value = np.stack([2 * cx, 2 * cy, -np.ones(k * k)], axis=1)  # (H, 3)
        elif name.endswith("attn.v.weight"):
            value = np.eye(shape[0])
        elif name.endswith("gating_param") or (len(shape) == 1 and name.endswith("weight")):
            value = np.ones(shape)
        elif name.endswith("bias"):
            value = np.zeros(shape)
        else:
            value = rng.normal(0, 0.02, shape)
        params[name] = value.astype("float32")
    return params


def adamw_step(params, grads, m, v, t, lr, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """p -= lr decay p, for matrices; then p -= lr mhat / (sqrt(vhat) + eps). All in place.

    m and v: running means of g and g^2, zeros at first; mhat and vhat undo that start. t = 1, 2...
    """
    for name, p in params.items():
        if p.ndim >= 2 and name not in ("cls_token", "pos_embed"):
            p -= lr * decay * p
        m[name] += (1 - beta1) * (grads[name] - m[name])
        v[name] += (1 - beta2) * (grads[name] ** 2 - v[name])
        mhat, vhat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
        p -= lr * mhat / (np.sqrt(vhat) + eps)


def warmup_cosine(t, total, peak, warmup):
    """A rate that climbs from 1 % of the peak in a line, then falls to it along a cosine."""
    if t < warmup:
        return peak * (0.01 + 0.99 * t / warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + cos(pi * t / total)))


def normalize(images, data):
    """Bytes to float32 with mean 0 and deviation 1, colour by colour.  (B, channels, h, w)."""
    mean, std = (np.array(x, "float32")[:, None, None] for x in (data.mean, data.std))
    return (images.astype("float32") / 255 - mean) / std


def accuracy(split, params, data):
    """Which fraction of a split's images has its largest logit at the label."""
    right = 0
    for start in range(0, len(split.labels), BATCH):
        images = normalize(split.images[start : start + BATCH], data)
        logits, _ = convit_forward(images, params, DEPTH, GPSA, HEADS)
        right += (logits.argmax(axis=1) == split.labels[start : start + BATCH]).sum()
    return right / len(split.labels)


def train(data, epochs=EPOCHS):
    """The whole training, printed as it goes. Returns the parameters and the last accuracy."""
    images, labels = data.train.images, data.train.labels
    _, channels, height, width = images.shape
    patch_shape, num_patches = (WIDTH, channels, PATCH, PATCH), height * width // PATCH**2
    shapes = param_shapes(patch_shape, num_patches, HIDDEN, HEADS, DEPTH, GPSA, len(data.classes))
    params = init_params(shapes)
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    rng, began = np.random.default_rng(0), time.time()
    per_epoch = len(labels) // BATCH
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = rng.permutation(len(labels))
        which = order[step % per_epoch * BATCH :][:BATCH]
        logits, cache = convit_forward(normalize(images[which], data), params, DEPTH, GPSA, HEADS)
        loss, cache_loss = cross_entropy_forward(logits, labels[which])
        grads = convit_backward(cross_entropy_backward(1, cache_loss), cache)
        lr = warmup_cosine(step / per_epoch, epochs, PEAK, warmup=1)
        adamw_step(params, grads, m, v, step + 1, lr, DECAY)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:4}   loss {loss:.3f}   {time.time() - began:3.0f} s", flush=True)
        if (step + 1) % per_epoch == 0:
            right = accuracy(data.val, params, data)
            print(f"epoch {(step + 1) // per_epoch}: {right:.1%} of the validation images right")
    return params, right


if __name__ == "__main__":
    train(load_dataset("shapes"))
