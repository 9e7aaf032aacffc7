// The passes of a training step that are no matrix products, in CUDA C++.
//
// Whoever compiles this says what T is, the type of the arithmetic (float or double), and S, the
// type of what products read: T, or bf16. A pointer that is both read and written is marked BOTH.
//
// A row belongs to a warp: LANES threads beside each other, which pass values by shuffles. Blocks
// are LANES x warps threads, and every loop has a stride of all of them, so that any grid is right.
// No sum depends on the order in which threads happen to run: the same bits every time.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned char u8;

#ifndef LANES
#define LANES 32
#endif
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define BOTH
#define KERNEL extern "C" __global__ void
#define EACH_ROW(r, rows) \
    for (i64 r = (i64)blockIdx.x * blockDim.y + threadIdx.y; r < rows; r += (i64)gridDim.x * blockDim.y)
#define EACH_LANE(i, count) for (int i = threadIdx.x; i < count; i += LANES)
#define THREAD (threadIdx.y * LANES + threadIdx.x)
#define THREADS (blockDim.y * LANES)
#define EACH_THREAD(i, count) \
    for (i64 i = (i64)blockIdx.x * THREADS + THREAD; i < count; i += (i64)gridDim.x * THREADS)

__device__ inline float value(float x) { return x; }
__device__ inline double value(double x) { return x; }
__device__ inline float value(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void put(float* p, T x) { *p = x; }
__device__ inline void put(double* p, T x) { *p = x; }
__device__ inline void put(bf16* p, T x) {  // to the nearest, ties to even, as the device rounds
    unsigned bits = __float_as_uint((float)x);
    bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    p->bits = is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__device__ inline T lane_sum(T x) {
    for (int o = LANES / 2; o; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o, LANES);
    return x;
}

__device__ inline T lane_max(T x) {
    for (int o = LANES / 2; o; o /= 2) {
        T other = __shfl_xor_sync(0xffffffff, x, o, LANES);
        x = x > other ? x : other;
    }
    return x;
}

__device__ inline T sigmoid(T x) { return (T)0.5 + (T)0.5 * tanh((T)0.5 * x); }

// What each warp has summed, count numbers in a row of shared memory: their sum over the warps.
__device__ inline T over_warps(const T* sums, int count, int i) {
    T total = 0;
    for (int w = 0; w < blockDim.y; w++) total += sums[w * count + i];
    return total;
}

// ---------------------------------------------------------------- tokens

// images (B, C, H, W) to patches (B * N, C * ph * pw)
KERNEL patches(const T* images, T* out, i64 rows, i64 C, i64 H, i64 W, i64 ph, i64 pw) {
    int cols = W / pw, N = H / ph * cols, area = ph * pw, features = C * area;
    EACH_ROW(r, rows) {
        int n = r % N;
        const T* image = images + r / N * C * H * W + n / cols * ph * W + n % cols * pw;
        EACH_LANE(f, features) {
            int c = f / area, y = f % area / (int)pw, x = f % (int)pw;
            out[r * features + f] = image[(c * H + y) * W + x];
        }
    }
}

// x (B * N, D) += bias + pos (N, D), where there is one
KERNEL embed(BOTH T* x, const T* bias, const T* pos, i64 rows, i64 N, i64 D) {
    EACH_ROW(r, rows) EACH_LANE(i, D) x[r * D + i] += bias[i] + (pos ? pos[r % N * D + i] : 0);
}

// out (B, 1 + N, D): the class token before x (B, N, D)
KERNEL join(const T* x, const T* token, T* out, i64 rows, i64 N, i64 D) {
    EACH_ROW(r, rows) {
        i64 n = r % (N + 1), from = (r / (N + 1) * N + n - 1) * D;
        EACH_LANE(i, D) out[r * D + i] = n ? x[from + i] : token[i];
    }
}

// out = factor x, a factor for each image of `tokens` rows, or none
KERNEL scale(const T* x, const T* factor, S* out, i64 rows, i64 tokens, i64 D) {
    EACH_ROW(r, rows) {
        T f = factor ? factor[r / tokens] : 1;
        EACH_LANE(i, D) put(out + r * D + i, f * x[r * D + i]);
    }
}

// sum = x + factor (y + ybias), where there is a y;  out = layernorm(sum), where there is a weight
KERNEL add_norm(const T* x, const T* y, const T* ybias, const T* factor, T* sum, const T* weight,
                const T* bias, S* out, T* mean, T* rstd, i64 rows, i64 tokens, i64 D, double eps) {
    EACH_ROW(r, rows) {
        const T* row = x + r * D;
        if (y) {
            T f = factor ? factor[r / tokens] : 1;
            EACH_LANE(i, D) sum[r * D + i] = row[i] + f * (y[r * D + i] + (ybias ? ybias[i] : 0));
            row = sum + r * D;
        }
        if (!weight) continue;
        T total = 0, square = 0;
        EACH_LANE(i, D) total += row[i];
        T m = lane_sum(total) / D;
        EACH_LANE(i, D) square += (row[i] - m) * (row[i] - m);
        T s = 1 / sqrt(lane_sum(square) / D + (T)eps);
        EACH_LANE(i, D) put(out + r * D + i, (row[i] - m) * s * weight[i] + bias[i]);
        if (threadIdx.x == 0) { mean[r] = m; rstd[r] = s; }
    }
}

// dx = residual + layernorm's, the residual belonging to every `every`-th row alone;
// operand = factor dx, where there is one; sums (grid, 2, D): each block's part of dweight and dbias
KERNEL norm_backward(const T* dy, const T* x, const T* mean, const T* rstd, const T* weight,
                     const T* residual, const T* factor, T* dx, S* operand, T* sums, i64 rows,
                     i64 tokens, i64 every, i64 D) {
    extern __shared__ double shared[];
    T *all = (T*)shared, *mine = all + threadIdx.y * 2 * D;
    EACH_LANE(i, D) mine[i] = mine[D + i] = 0;
    EACH_ROW(r, rows) {
        const T *dys = dy + r * D, *xs = x + r * D;
        T m = mean[r], s = rstd[r], a = 0, b = 0, f = factor ? factor[r / tokens] : 1;
        EACH_LANE(i, D) {
            T xhat = (xs[i] - m) * s, g = dys[i] * weight[i];
            mine[i] += dys[i] * xhat;
            mine[D + i] += dys[i];
            a += g;
            b += g * xhat;
        }
        a = lane_sum(a) / D;
        b = lane_sum(b) / D;
        const T* rest = residual && r % every == 0 ? residual + r / every * D : 0;
        EACH_LANE(i, D) {
            T xhat = (xs[i] - m) * s;
            T d = (rest ? rest[i] : 0) + s * (dys[i] * weight[i] - a - xhat * b);
            dx[r * D + i] = d;
            if (operand) put(operand + r * D + i, f * d);
        }
    }
    __syncthreads();
    for (int i = THREAD; i < 2 * D; i += THREADS)
        sums[blockIdx.x * 2 * D + i] = over_warps(all, 2 * D, i);
}

// out = gelu(h + bias)
KERNEL gelu(const T* h, const T* bias, S* out, i64 rows, i64 M) {
    EACH_ROW(r, rows) EACH_LANE(i, M) {
        T x = h[r * M + i] + bias[i];
        put(out + r * M + i, x * ((T)0.5 * (1 + erf(x * (T)0.70710678118654752))));
    }
}

// dh = dy (Phi(x) + x phi(x)),  x = h + bias
KERNEL gelu_backward(const T* dy, const T* h, const T* bias, S* dh, i64 rows, i64 M) {
    EACH_ROW(r, rows) EACH_LANE(i, M) {
        T x = h[r * M + i] + bias[i];
        T cdf = (T)0.5 * (1 + erf(x * (T)0.70710678118654752));
        T pdf = exp((T)-0.5 * x * x) * (T)0.39894228040143268;
        put(dh + r * M + i, dy[r * M + i] * (cdf + x * pdf));
    }
}

// ---------------------------------------------------------------- attention

// x (B * N, parts * D) + bias to heads (parts, B, H, N, d); the bias is `first` up to feature
// `width` and `second` from there on
KERNEL split(const T* x, const T* first, const T* second, S* heads, i64 rows, i64 N, i64 parts,
             i64 H, i64 d, i64 width) {
    int D = H * d, features = parts * D;
    i64 B = rows / N;
    EACH_ROW(r, rows) {
        i64 b = r / N, n = r % N;
        EACH_LANE(f, features) {
            T bias = !first ? 0 : f < width ? first[f] : second[f - width];
            int p = f / D, h = f % D / (int)d, i = f % (int)d;
            put(heads + (((p * B + b) * H + h) * N + n) * d + i, x[r * features + f] + bias);
        }
    }
}

// heads (parts, B, H, N, d) to out (B * N, parts * D)
KERNEL merge(const T* heads, S* out, i64 rows, i64 N, i64 parts, i64 H, i64 d) {
    int D = H * d, features = parts * D;
    i64 B = rows / N;
    EACH_ROW(r, rows) {
        i64 b = r / N, n = r % N;
        EACH_LANE(f, features) {
            int p = f / D, h = f % D / (int)d, i = f % (int)d;
            put(out + r * features + f, heads[(((p * B + b) * H + h) * N + n) * d + i]);
        }
    }
}

// P (H, N, N): softmax over the keys k of w . (dx, dy, dx^2 + dy^2), offsets of k from the query
KERNEL positions(const T* weight, T* P, i64 H, i64 rows, i64 cols) {
    int N = rows * cols;
    EACH_ROW(r, H * N) {
        const T* w = weight + r / N * 3;
        int q = r % N, row = q / (int)cols, col = q % (int)cols;
        T top = -INFINITY, total = 0;
        EACH_LANE(k, N) {
            T x = k % (int)cols - col, y = k / (int)cols - row;
            T score = w[0] * x + w[1] * y + w[2] * (x * x + y * y);
            P[r * N + k] = score;
            top = score > top ? score : top;
        }
        top = lane_max(top);
        EACH_LANE(k, N) total += P[r * N + k] = exp(P[r * N + k] - top);
        total = lane_sum(total);
        EACH_LANE(k, N) P[r * N + k] /= total;
    }
}

// C = softmax(scores), (B, H, Q, K), and with a gate A = (1 - g) C + g P, P (H, Q, K)
KERNEL softmax(const T* scores, const T* P, const T* gating, S* C, S* A, i64 rows, i64 H, i64 Q,
               i64 K) {
    EACH_ROW(r, rows) {
        const T* s = scores + r * K;
        T top = -INFINITY, total = 0;
        EACH_LANE(k, K) top = s[k] > top ? s[k] : top;
        top = lane_max(top);
        EACH_LANE(k, K) total += exp(s[k] - top);
        T inverse = 1 / lane_sum(total);
        T g = P ? sigmoid(gating[r / Q % H]) : 0;
        const T* p = P + r % (H * Q) * K;
        EACH_LANE(k, K) {
            T c = exp(s[k] - top) * inverse;
            put(C + r * K + k, c);
            if (P) put(A + r * K + k, (1 - g) * c + g * p[k]);
        }
    }
}

// dS = (1 - g) C (dA - rho),  rho = sum over the keys of C dA. With a gate also the sums over the
// images: of dA, into dA_sum (H, Q, K), and of rho, into rho (H, Q). A block takes a query of a head.
KERNEL softmax_backward(const T* dA, const S* C, const T* gating, S* dS, T* dA_sum, T* rho, i64 B,
                        i64 H, i64 Q, i64 K) {
    extern __shared__ double shared[];
    T *all = (T*)shared, *mine = all + threadIdx.y * (K + 1);
    for (i64 j = blockIdx.x; j < H * Q; j += gridDim.x) {
        T g = gating ? sigmoid(gating[j / Q]) : 0, dots = 0;
        EACH_LANE(k, K) mine[k] = 0;
        for (i64 b = threadIdx.y; b < B; b += blockDim.y) {
            i64 at = (b * H * Q + j) * K;
            T dot = 0;
            EACH_LANE(k, K) {
                dot += dA[at + k] * value(C[at + k]);
                mine[k] += dA[at + k];
            }
            dot = lane_sum(dot);
            dots += dot;
            EACH_LANE(k, K) {
                T d = (1 - g) * value(C[at + k]) * (dA[at + k] - dot);
                put(dS + at + k, d);
            }
        }
        if (!gating) continue;
        if (threadIdx.x == 0) mine[K] = dots;
        __syncthreads();
        for (int k = THREAD; k < K; k += THREADS) dA_sum[j * K + k] = over_warps(all, K + 1, k);
        if (THREAD == 0) rho[j] = over_warps(all, K + 1, K);
        __syncthreads();
    }
}

// The gradients of pos_proj.weight (H, 3), of its bias (H,), which is 0, and of gating_param (H,),
// from the sums over the images. A block takes a head.
KERNEL positions_backward(const T* dA_sum, const T* P, const T* rho, const T* gating, T* dweight,
                          T* dbias, T* dgating, i64 H, i64 rows, i64 cols) {
    extern __shared__ double shared[];
    T *all = (T*)shared, *mine = all + threadIdx.y * 4;
    int N = rows * cols;
    for (i64 h = blockIdx.x; h < H; h += gridDim.x) {
        T through_x = 0, through_y = 0, through_square = 0, gate = 0;
        for (int q = threadIdx.y; q < N; q += blockDim.y) {
            const T *d = dA_sum + (h * N + q) * N, *p = P + (h * N + q) * N;
            int row = q / (int)cols, col = q % (int)cols;
            T dot = 0;
            EACH_LANE(k, N) dot += d[k] * p[k];
            dot = lane_sum(dot);
            if (threadIdx.x == 0) gate += dot - rho[h * N + q];
            EACH_LANE(k, N) {
                T x = k % (int)cols - col, y = k / (int)cols - row, dscore = p[k] * (d[k] - dot);
                through_x += dscore * x;
                through_y += dscore * y;
                through_square += dscore * (x * x + y * y);
            }
        }
        mine[0] = lane_sum(through_x);  // all lanes write the same
        mine[1] = lane_sum(through_y);
        mine[2] = lane_sum(through_square);
        mine[3] = lane_sum(gate);
        __syncthreads();
        if (THREAD == 0) {
            T g = sigmoid(gating[h]);
            for (int c = 0; c < 3; c++) dweight[h * 3 + c] = g * over_warps(all, 4, c);
            dbias[h] = 0;
            dgating[h] = g * (1 - g) * over_warps(all, 4, 3);
        }
        __syncthreads();
    }
}

// ---------------------------------------------------------------- loss

// The mean cross-entropy, the count of right answers, and dlogits. Targets are labels (B,), then
// smoothed, or probabilities (B, C). One block takes all images.
KERNEL cross_entropy(const T* logits, const i64* labels, const T* targets, S* dlogits, T* loss,
                     i64* correct, i64 B, i64 C, double smoothing) {
    extern __shared__ double shared[];
    T *all = (T*)shared, *mine = all + threadIdx.y * 2;
    T losses = 0, rights = 0;
    for (i64 b = threadIdx.y; b < B; b += blockDim.y) {
        const T *x = logits + b * C, *t = targets ? targets + b * C : 0;
        T top = -INFINITY, likely = -INFINITY, total = 0;
        EACH_LANE(c, C) {
            top = x[c] > top ? x[c] : top;
            if (t) likely = t[c] > likely ? t[c] : likely;
        }
        top = lane_max(top);
        likely = lane_max(likely);
        T answer = C, label = C;  // the first class with the largest logit, and target
        EACH_LANE(c, C) {
            total += exp(x[c] - top);
            if (x[c] == top && c < answer) answer = c;
            if (t && t[c] == likely && c < label) label = c;
        }
        T log_total = log(lane_sum(total)), sum = 0;
        answer = -lane_max(-answer);
        label = t ? -lane_max(-label) : (T)labels[b];
        T low = (T)(smoothing / C), one = 1 - (T)smoothing;
        EACH_LANE(c, C) {
            T y = t ? t[c] : (c == label ? one : 0) + low;
            sum += y;
            losses -= y * (x[c] - top - log_total);
        }
        sum = lane_sum(sum);
        EACH_LANE(c, C) {
            T y = t ? t[c] : (c == label ? one : 0) + low;
            put(dlogits + b * C + c, (exp(x[c] - top - log_total) * sum - y) / B);
        }
        rights += answer == label;
    }
    mine[0] = lane_sum(losses);
    mine[1] = rights;
    __syncthreads();
    if (THREAD == 0) {
        *loss = over_warps(all, 2, 0) / B;
        *correct = (i64)over_warps(all, 2, 1);
    }
}

// ---------------------------------------------------------------- chance

__device__ inline u64 mix(u64 bits) {  // SplitMix64's finaliser, as in arrays.py
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EBull;
    return bits ^ bits >> 31;
}

__device__ inline u64 drawn(u64 bits, u64 counter) {
    return mix((bits ^ mix(counter + 1)) + 0x9E3779B97F4A7C15ull);
}

// out (depth, 2, B): what each block's two branches of an image are multiplied by, 0 or 1 / keep
KERNEL drop_path(T* out, const i64* number, i64 seed, i64 use, i64 depth, i64 B, double rate) {
    u64 bits = drawn(drawn((u64)seed, (u64)use), (u64)*number);
    EACH_THREAD(e, depth * 2 * B) {
        i64 block = e / (2 * B), branch = e / B % 2;
        double drop = rate * block / (depth > 1 ? depth - 1 : 1);
        u64 chance = drawn(drawn(drawn(bits, block), branch), e % B) >> 40;
        float uniform = (float)chance * 5.9604644775390625e-8f;  // 2^-24
        out[e] = (uniform >= (float)drop ? (T)1 : (T)0) / (T)(1 - drop);
    }
}

// ---------------------------------------------------------------- optimizer

// What changes from step to step. number: the step's; rates: the learning rate, that divided by
// Adam's first correction, and the inverse root of the second
KERNEL note_number(i64* number, i64 step) { *number = step; }

KERNEL note_rates(T* rates, double lr, double step_size, double root) {
    rates[0] = lr;
    rates[1] = step_size;
    rates[2] = root;
}

// What a step has found, in one place
KERNEL collect(const T* loss, const i64* correct, const T* norm, T* numbers) {
    numbers[0] = *loss;
    numbers[1] = *correct;
    numbers[2] = *norm;
}

// kind: of each CHUNK of elements, 0 is left as it is, 1 is trained, 2 is also decayed, 3 is a
// running statistic, whose gradient is what it is off by
#define CHUNK 1024
#define IS_TRAINED(i) (kind[(i) / CHUNK] % 3)

// sums (grid,): each block's part of the square of the gradients' norm
KERNEL squares(const T* grads, const u8* kind, T* sums, i64 n) {
    extern __shared__ double shared[];
    T *all = (T*)shared, square = 0;
    EACH_THREAD(i, n) if (IS_TRAINED(i)) square += grads[i] * grads[i];
    all[threadIdx.y] = lane_sum(square);
    __syncthreads();
    if (THREAD == 0) sums[blockIdx.x] = over_warps(all, 1, 0);
}

// norm: the gradients' norm; grads are scaled down where it is above the limit
KERNEL clip(BOTH T* grads, const u8* kind, const T* sums, T* norm, i64 n, i64 count, double limit) {
    T square = 0;
    EACH_LANE(i, count) square += sums[i];
    T found = sqrt(lane_sum(square)), factor = (T)limit / found;
    if (THREAD == 0 && blockIdx.x == 0) *norm = found;
    if (factor >= 1) return;  // where the norm is NaN it is not
    EACH_THREAD(i, n) if (IS_TRAINED(i)) grads[i] *= factor;
}

KERNEL adamw(BOTH T* params, const T* grads, BOTH T* exp_avg, BOTH T* exp_avg_sq, const u8* kind,
             const T* rates, i64 n, double decay, double beta1, double beta2, double eps) {
    T keep = 1 - rates[0] * decay, step_size = rates[1], root = rates[2];
    T b1 = beta1, b2 = beta2, rest1 = 1 - beta1, rest2 = 1 - beta2;
    EACH_THREAD(i, n) {
        u8 k = kind[i / CHUNK];
        if (!k) continue;
        T g = grads[i], p = params[i];
        if (k == 3) {
            params[i] = p - (T)0.1 * g;
            continue;
        }
        T m = exp_avg[i] = b1 * exp_avg[i] + rest1 * g;
        T v = exp_avg_sq[i] = b2 * exp_avg_sq[i] + rest2 * g * g;
        if (k == 2) p *= keep;
        params[i] = p - step_size * m / (sqrt(v) * root + (T)eps);
    }
}

// Muon: matrices of one shape, each from its start on in the flat buffers. x (count, least, most) has
// them one after the other, those that are taller than wide turned. place: where element e of a
// matrix lies in x's
__device__ inline i64 place(i64 e, i64 least, i64 most, bool is_turned) {
    return is_turned ? e % least * most + e / least : e;
}

// exp_avg: the average of the gradients; x: that with the newest counted once more, over its norm.
// A matrix belongs to a block
KERNEL muon_begin(const T* grads, BOTH T* exp_avg, const i64* starts, const u8* turned, T* x,
                  i64 least, i64 most, double momentum) {
    extern __shared__ double shared[];
    T *all = (T*)shared, square = 0, mu = momentum, rest = 1 - momentum;
    i64 size = least * most, start = starts[blockIdx.x];
    T* matrix = x + blockIdx.x * size;
    for (i64 e = THREAD; e < size; e += THREADS) {
        i64 i = start + e;
        T g = grads[i], m = exp_avg[i];
        m += rest * (g - m);
        exp_avg[i] = m;
        T ahead = g + mu * (m - g);
        matrix[place(e, least, most, turned[blockIdx.x])] = ahead;
        square += ahead * ahead;
    }
    all[threadIdx.y] = lane_sum(square);
    __syncthreads();
    T norm = sqrt(over_warps(all, 1, 0)), lowest = 1e-7;
    if (norm < lowest) norm = lowest;  // NaN stays
    for (i64 e = THREAD; e < size; e += THREADS) matrix[e] /= norm;
}

// square (count, least, least) = a I + b gram + c square
KERNEL muon_polynomial(const T* gram, BOTH T* square, i64 n, i64 least, double a, double b, double c) {
    EACH_THREAD(i, n) {
        bool is_diagonal = i % (least * least) % (least + 1) == 0;
        square[i] = (is_diagonal ? (T)a : 0) + (T)b * gram[i] + (T)c * square[i];
    }
}

KERNEL muon_end(BOTH T* params, const T* x, const i64* starts, const u8* turned, const T* rates,
                i64 n, i64 least, i64 most, double decay, double scale) {
    i64 size = least * most;
    T keep = 1 - rates[0] * decay, step_size = rates[0] * scale;
    EACH_THREAD(e, n) {
        i64 k = e / size, i = starts[k] + e % size;
        T direction = x[k * size + place(e % size, least, most, turned[k])];
        params[i] = keep * params[i] - step_size * direction;
    }
}

KERNEL average(BOTH T* mean, const T* params, i64 n, double decay) {
    T rest = 1 - decay;
    EACH_THREAD(i, n) mean[i] += rest * (params[i] - mean[i]);
}
