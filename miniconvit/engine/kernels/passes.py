"""What stands between two matrix products, each in one pass over memory. All arrays are rows of
tokens, (R, D), contiguous, float32. And AdamW's update of a parameter."""

import numpy as np

from .compiled import inlined, loop

F = np.float32  # Numba knows no weak numbers: a plain 0.5 would turn an expression into float64
LOG2_E = F(1.4426950408889634)
INVERSE_SQRT_2PI = F(0.3989422804014327)


@inlined
def as_float(bits):
    """The float32 of an integer's 32 bits."""
    return np.int32(bits).view(np.float32)


@inlined
def exp2_of_negative(y):
    """2^y for y <= 0, off by 1e-7 of itself; 0 below float32's normal numbers; NaN stays NaN.

    2^y = 2^n 2^f with a whole n and f in [-1/2, 1/2], of which 2^f is a polynomial.
    """
    tiny = y < F(-126.0)
    bounded = F(-126.0) if tiny else y
    n = np.int32((bounded if bounded > F(-127.0) else F(-126.0)) - F(0.5))  # NaN is no integer
    f = bounded - F(n)
    p = F(0.00015345822511180808)
    p = p * f + F(0.0013399936168615352)
    p = p * f + F(0.009618488964649938)
    p = p * f + F(0.055503287648527834)
    p = p * f + F(0.24022646890135874)
    p = p * f + F(0.6931472057427635)
    p = p * f + F(1.0)
    return F(0.0) if tiny else p * as_float((n + np.int32(127)) << np.int32(23))


@inlined
def normal_cdf(x):
    """Phi(x), and exp(-x^2 / 2), of which Phi(-|x|) is a polynomial in t = 1 / (1 + 0.35 |x|).

    Phi is off by at most 2e-7, and by 1e-5 of itself.
    """
    e = exp2_of_negative(x * x * (F(-0.5) * LOG2_E))
    t = F(1.0) / (F(1.0) + F(0.35) * abs(x))
    p = F(0.044615018861974526)
    p = p * t + F(-0.18442743293929992)
    p = p * t + F(0.21107975796590442)
    p = p * t + F(0.008929212436410539)
    p = p * t + F(0.14315555623267817)
    p = p * t + F(0.13687148120253123)
    p = p * t + F(0.13977644193518213)
    tail = p * t * e
    return (F(1.0) - tail if x >= F(0.0) else tail), e


@inlined
def mean_and_rstd(x, eps):
    """A row's mean and 1 / sqrt(variance + eps)."""
    total, squares = F(0.0), F(0.0)
    for d in range(x.size):
        total += x[d]
    mean = total / F(x.size)
    for d in range(x.size):
        squares += (x[d] - mean) * (x[d] - mean)
    return mean, F(1.0) / np.sqrt(squares / F(x.size) + eps)


@loop("void(f4[:,::1], f4[::1], f4[::1], f4, f4[:,::1], f4[:,::1])")
def norm_forward(x, weight, bias, eps, y, statistics):
    """y = weight * xhat + bias. statistics (R, 2): a row's mean and 1 / deviation."""
    for r in range(x.shape[0]):
        here, there = x[r], y[r]
        mean, rstd = mean_and_rstd(here, eps)
        statistics[r, 0], statistics[r, 1] = mean, rstd
        for d in range(weight.size):
            there[d] = (here[d] - mean) * rstd * weight[d] + bias[d]


@loop("void(f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f4[:,::1], f4[:,::1], f4[::1], f4[::1])")
def norm_backward(dy, x, statistics, weight, dresidual, dx, dweight, dbias):
    """dx = dresidual + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)), dxhat = weight *
    dy; dweight = sum of dy * xhat and dbias = sum of dy over the rows.

    dresidual is what reaches x beside the norm.
    """
    D = weight.size
    dweight[:] = F(0.0)
    dbias[:] = F(0.0)
    for r in range(x.shape[0]):
        here, dhere, residual, there = x[r], dy[r], dresidual[r], dx[r]
        mean, rstd = statistics[r, 0], statistics[r, 1]
        through_mean, through_variance = F(0.0), F(0.0)
        for d in range(D):
            xhat, dxhat = (here[d] - mean) * rstd, dhere[d] * weight[d]
            through_mean += dxhat
            through_variance += dxhat * xhat
            dweight[d] += dhere[d] * xhat
            dbias[d] += dhere[d]
        through_mean /= F(D)
        through_variance /= F(D)
        for d in range(D):
            xhat, dxhat = (here[d] - mean) * rstd, dhere[d] * weight[d]
            there[d] = residual[d] + rstd * (dxhat - through_mean - xhat * through_variance)


@loop("void(f4[:,::1], f4[::1])")
def add_bias(y, bias):
    """y += bias."""
    for r in range(y.shape[0]):
        here = y[r]
        for d in range(bias.size):
            here[d] += bias[d]


@loop("void(f4[:,::1], f4[::1], f4[::1], f4[:,::1])")
def add_branch(y, bias, factor, residual):
    """y = residual + factor * (y + bias), with one factor for each row."""
    for r in range(y.shape[0]):
        here, before, share = y[r], residual[r], factor[r]
        for d in range(bias.size):
            here[d] = before[d] + share * (here[d] + bias[d])


@loop("void(f4[:,::1], f4[::1], f4[:,::1], f4[::1])")
def scale(dy, factor, scaled, sums):
    """scaled = factor * dy, and its sums over the rows."""
    sums[:] = F(0.0)
    for r in range(dy.shape[0]):
        here, there, share = dy[r], scaled[r], factor[r]
        for d in range(sums.size):
            there[d] = share * here[d]
            sums[d] += there[d]


@loop("void(f4[:,::1], f4[::1])")
def sum_rows(x, sums):
    """The sum over the rows."""
    sums[:] = F(0.0)
    for r in range(x.shape[0]):
        here = x[r]
        for d in range(sums.size):
            sums[d] += here[d]


@loop("void(f4[:,::1], f4[::1], f4[:,::1])")
def gelu(x, bias, active):
    """active = gelu(x + bias), and x becomes gelu's derivative there, Phi + (x + bias) phi."""
    for r in range(x.shape[0]):
        here, there = x[r], active[r]
        for d in range(bias.size):
            value = here[d] + bias[d]
            cdf, e = normal_cdf(value)
            there[d] = value * cdf
            here[d] = cdf + value * e * INVERSE_SQRT_2PI


@loop("void(f4[:,::1], f4[::1])")
def gelu_alone(x, bias):
    """x = gelu(x + bias)."""
    for r in range(x.shape[0]):
        here = x[r]
        for d in range(bias.size):
            value = here[d] + bias[d]
            here[d] = value * normal_cdf(value)[0]


@loop("void(f4[:,::1], f4[:,::1], f4[::1])")
def gelu_backward(dactive, slope, sums):
    """dactive *= slope, and its sums over the rows."""
    sums[:] = F(0.0)
    for r in range(dactive.shape[0]):
        here, derivative = dactive[r], slope[r]
        for d in range(sums.size):
            here[d] *= derivative[d]
            sums[d] += here[d]


@inlined
def exponentials(scores, factor):
    """A row becomes 2^(factor (scores - their maximum)). Returns 1 / its sum."""
    largest, total = scores[0], F(0.0)
    for k in range(scores.size):
        largest = scores[k] if scores[k] > largest else largest
    for k in range(scores.size):
        scores[k] = exp2_of_negative((scores[k] - largest) * factor)
        total += scores[k]
    return F(1.0) / total


@loop("void(f4[:,::1], f4)")
def softmax(S, factor):
    """S = softmax of factor * S over its rows."""
    for r in range(S.shape[0]):
        here = S[r]
        inverse = exponentials(here, factor * LOG2_E)
        for k in range(S.shape[1]):
            here[k] *= inverse


@loop("void(f4[:,:,:,::1], f4[::1], f4[:,:,::1], f4[:,:,:,::1])")
def mix(C, keep, gP, A):
    """A = keep C + gP, of maps C (B, H, queries, keys) and gP (H, queries, keys)."""
    B, H, queries, keys = C.shape
    for b in range(B):
        for h in range(H):
            share = keep[h]
            for q in range(queries):
                content, position, mixed = C[b, h, q], gP[h, q], A[b, h, q]
                for k in range(keys):
                    mixed[k] = share * content[k] + position[k]


@loop("void(f4[:,:,:,::1], f4[:,:,:,::1], f4[::1], f4, f4[:,:,::1], f4[:,:,::1])")
def softmax_backward(dA, C, keep, factor, dA_sum, rho):
    """dA becomes factor keep C (dA - rho) with rho (B, H, queries) the sum of C dA over a row.

    dA is added to dA_sum (H, queries, keys).
    """
    B, H, queries, keys = C.shape
    for b in range(B):
        for h in range(H):
            share = factor * keep[h]
            for q in range(queries):
                here, content, total = dA[b, h, q], C[b, h, q], dA_sum[h, q]
                mean = F(0.0)
                for k in range(keys):
                    mean += content[k] * here[k]
                    total[k] += here[k]
                rho[b, h, q] = mean
                for k in range(keys):
                    here[k] = share * content[k] * (here[k] - mean)


@loop("void(f4[::1], f4[::1], f4[::1], f4[::1], f4, f4, f4, f4, f4, f4, f4, f4)")
def adamw(p, g, m, v, kept, rate, beta1, rest1, beta2, rest2, scale, eps):
    """m = beta1 m + rest1 g;  v = beta2 v + rest2 g^2;  p = kept p - rate m / (scale sqrt v + eps).

    Of a whole parameter as a vector.
    """
    for i in range(p.size):
        first = beta1 * m[i] + rest1 * g[i]
        second = beta2 * v[i] + rest2 * g[i] * g[i]
        m[i], v[i] = first, second
        p[i] = kept * p[i] - rate * first / (scale * np.sqrt(second) + eps)
