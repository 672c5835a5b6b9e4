/* CPU kernels: passes over memory that torch makes one operation at a time. Plain C, no headers but the standard ones, so that
   the system's compiler makes them in under a second; `kernels.py` builds, checks and calls them, and says what each computes.

   Each function exists for float and for bfloat16 (`_f32`, `_bf16`): values are widened to float, summed in float, and rounded
   where the tensors they replace would have been. Rows are independent; threads divide them. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide_bf16(bf16 x) { uint32_t b = (uint32_t)x << 16; float f; memcpy(&f, &b, 4); return f; }
static inline bf16 narrow_bf16(float f) { /* to nearest, ties to even; a NaN stays one */
    uint32_t b; memcpy(&b, &f, 4);
    uint32_t up = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return (bf16)(((b & 0x7fffffffu) > 0x7f800000u) ? 0x7fc0u : up);
}
static inline float wide_f32(float x) { return x; }
static inline float narrow_f32(float x) { return x; }

/* exp to about 2 ulp, 0 below -87: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cody and Waite). Inlined, so that loops of it
   are vector code. */
static inline float exponential(float x) {
    float y = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(y * 1.44269504f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t b = x < -87.0f ? 0 : ((int32_t)n + 127) << 23; float s; memcpy(&s, &b, 4); /* a chosen result would be a branch where it is rounded */
    return p * s;
}
static inline float tangent(float x) { /* tanh; odd and exact at its ends */
    float a = fabsf(x), e = exponential(-2.0f * a), t = (1.0f - e) / (1.0f + e);
    t = a < 1e-3f ? a - a * a * a / 3.0f : t;
    return x < 0 ? -t : t;
}
/* logits = cap * tanh(scale * z / cap) / temperature, or scale * z / temperature where cap is 0 */
static inline float mapped(float z, float scale, float cap, float temperature) {
    z *= scale;
    return (cap > 0 ? cap * tangent(z / cap) : z) / temperature;
}

#define EACH_TYPE(F) F(float, f32) F(bf16, bf16)

/* the largest of x[a..b): many running maxima, because compilers may not reorder one where NaN counts, and one vector of them waits
   for itself */
#define LARGEST(T, S) \
static inline float largest_##S(const T *x, int64_t a, int64_t b) { \
    float m[64], t = -INFINITY; for (int l = 0; l < 64; l++) m[l] = -INFINITY; \
    for (; a + 64 <= b; a += 64) for (int l = 0; l < 64; l++) { float y = wide_##S(x[a + l]); m[l] = y > m[l] ? y : m[l]; } \
    for (; a < b; a++) { float y = wide_##S(x[a]); t = y > t ? y : t; } \
    for (int l = 0; l < 64; l++) t = m[l] > t ? m[l] : t; \
    return t; \
}
EACH_TYPE(LARGEST)

/* z [n, v] becomes exp(y - top) (times the map's slope where `keep` and a cap), y = map(z); top and mass [n] */
#define OVERWRITE_EXP(T, S) \
void overwrite_exp_##S(T *z, int64_t n, int64_t v, float scale, float cap, float temperature, int keep, float *top, float *mass) { \
    int64_t pieces = n < 4 ? 8 : 1, width = (v + pieces - 1) / pieces; \
    float *part = malloc(sizeof(float) * n * pieces); \
    _Pragma("omp parallel") { \
    _Pragma("omp for schedule(static)") \
    for (int64_t w = 0; w < n * pieces; w++) { \
        const T *row = z + (w / pieces) * v; int64_t a = (w % pieces) * width, b = a + width < v ? a + width : v; \
        part[w] = largest_##S(row, a, b); } \
    _Pragma("omp for schedule(static)") \
    for (int64_t i = 0; i < n; i++) { \
        float m = -INFINITY; for (int64_t p = 0; p < pieces; p++) m = part[i * pieces + p] > m ? part[i * pieces + p] : m; \
        top[i] = mapped(m, scale, cap, temperature); } \
    _Pragma("omp for schedule(static)") \
    for (int64_t w = 0; w < n * pieces; w++) { \
        T *row = z + (w / pieces) * v; int64_t a = (w % pieces) * width, b = a + width < v ? a + width : v; \
        float t = top[w / pieces], s = 0; \
        if (cap > 0) { float slope = scale / temperature, back = temperature / cap; \
            for (int64_t j = a; j < b; j++) { float y = mapped(wide_##S(row[j]), scale, cap, temperature), e = exponential(y - t); s += e; \
                float u = y * back; row[j] = narrow_##S(keep ? e * (1.0f - u * u) * slope : e); } \
        } else { float factor = scale / temperature; \
            for (int64_t j = a; j < b; j++) { float e = exponential(wide_##S(row[j]) * factor - t); s += e; row[j] = narrow_##S(e); } } \
        part[w] = s; } \
    _Pragma("omp for schedule(static)") \
    for (int64_t i = 0; i < n; i++) { float s = 0; for (int64_t p = 0; p < pieces; p++) s += part[i * pieces + p]; mass[i] = s; } } \
    free(part); \
}
EACH_TYPE(OVERWRITE_EXP)

/* log-sum-exp of each block of `width` of the mapped logits, the last one short: own [n, blocks] at temperature 1, and warm at
   `temperature` (may be NULL). z is not written. */
#define BLOCK_LSE(T, S) \
void block_lse_##S(const T *z, int64_t n, int64_t v, int64_t width, float scale, float cap, float temperature, float *own, float *warm) { \
    int64_t blocks = (v + width - 1) / width; \
    _Pragma("omp parallel for schedule(static)") \
    for (int64_t w = 0; w < n * blocks; w++) { \
        const T *row = z + (w / blocks) * v; int64_t a = (w % blocks) * width, b = a + width < v ? a + width : v; \
        float t = mapped(largest_##S(row, a, b), scale, cap, 1.0f), s = 0, q = 0, cold = 1.0f / temperature; \
        if (t == -INFINITY) { own[w] = t; if (warm) warm[w] = t; continue; } \
        if (cap > 0) for (int64_t j = a; j < b; j++) { float y = mapped(wide_##S(row[j]), scale, cap, 1.0f) - t; s += exponential(y); q += exponential(y * cold); } \
        else if (warm) for (int64_t j = a; j < b; j++) { float y = wide_##S(row[j]) * scale - t; s += exponential(y); q += exponential(y * cold); } \
        else for (int64_t j = a; j < b; j++) s += exponential(wide_##S(row[j]) * scale - t); \
        own[w] = t + logf(s); if (warm) warm[w] = t * cold + logf(q); } \
}
EACH_TYPE(BLOCK_LSE)

/* root-mean-square norm of one row: to `out`; `late` rounds before the weight is multiplied in */
#define NORM_ROW(T, S) \
static inline float norm_row_##S(const T *x, const float *weight, int64_t h, float epsilon, int late, T *out) { \
    float s = 0; for (int64_t j = 0; j < h; j++) { float a = wide_##S(x[j]); s += a * a; } \
    float r = 1.0f / sqrtf(s / (float)h + epsilon); \
    if (late) for (int64_t j = 0; j < h; j++) out[j] = narrow_##S(wide_##S(narrow_##S(wide_##S(x[j]) * r)) * weight[j]); \
    else for (int64_t j = 0; j < h; j++) out[j] = narrow_##S(wide_##S(x[j]) * r * weight[j]); \
    return r; \
}
EACH_TYPE(NORM_ROW)

/* x [n, h] += y, or += norm(y) where `after`; then out = norm(x) where `before`. y and out may be NULL. */
#define ADD_NORM(T, S) \
void add_norm_##S(T *x, const T *y, const float *after, const float *before, int64_t n, int64_t h, float epsilon, int late, T *out) { \
    _Pragma("omp parallel for schedule(static) if(n > 1)") \
    for (int64_t i = 0; i < n; i++) { \
        T *row = x + i * h; \
        if (y) { const T *more = y + i * h; T kept[after ? h : 1]; \
            if (after) { norm_row_##S(more, after, h, epsilon, late, kept); more = kept; } \
            for (int64_t j = 0; j < h; j++) row[j] = narrow_##S(wide_##S(row[j]) + wide_##S(more[j])); } \
        if (out) { if (before) norm_row_##S(row, before, h, epsilon, late, out + i * h); else memcpy(out + i * h, row, h * sizeof(T)); } } \
}
EACH_TYPE(ADD_NORM)

/* out [n, h] = norm(x) with a weight, and rstd [n] = 1 / sqrt(mean(x^2) + epsilon), for the backward */
#define NORM(T, S) \
void norm_##S(const T *x, const float *weight, int64_t n, int64_t h, float epsilon, int late, T *out, float *rstd) { \
    _Pragma("omp parallel for schedule(static)") \
    for (int64_t i = 0; i < n; i++) rstd[i] = norm_row_##S(x + i * h, weight, h, epsilon, late, out + i * h); \
}
EACH_TYPE(NORM)

/* with u = dy * weight and r = rstd: dx = r u - x r^3 mean(u x), and, where asked for, dweight [h] = sum over rows of dy * (x r) */
#define NORM_BACKWARD(T, S) \
void norm_backward_##S(const T *dy, const T *x, const float *weight, const float *rstd, int64_t n, int64_t h, int late, T *dx, float *dweight) { \
    int64_t threads = omp_get_max_threads(); float *sums = dweight ? calloc(threads * h, sizeof(float)) : NULL; \
    _Pragma("omp parallel") { \
    float *own = sums ? sums + omp_get_thread_num() * h : NULL; \
    _Pragma("omp for schedule(static)") \
    for (int64_t i = 0; i < n; i++) { \
        const T *g = dy + i * h, *row = x + i * h; T *to = dx + i * h; float r = rstd[i], s = 0; \
        for (int64_t j = 0; j < h; j++) s += wide_##S(g[j]) * weight[j] * wide_##S(row[j]); \
        float c = s * r * r * r / (float)h; \
        for (int64_t j = 0; j < h; j++) to[j] = narrow_##S(wide_##S(g[j]) * weight[j] * r - wide_##S(row[j]) * c); \
        if (own && late) for (int64_t j = 0; j < h; j++) own[j] += wide_##S(g[j]) * wide_##S(narrow_##S(wide_##S(row[j]) * r)); \
        else if (own) for (int64_t j = 0; j < h; j++) own[j] += wide_##S(g[j]) * wide_##S(row[j]) * r; } \
    } \
    if (sums) { /* in the order of threads, so that a run repeats to the bit */ \
        for (int64_t j = 0; j < h; j++) { float s = 0; for (int64_t t = 0; t < threads; t++) s += sums[t * h + j]; dweight[j] = s; } \
        free(sums); } \
}
EACH_TYPE(NORM_BACKWARD)

/* a = act(g), act = silu (0) or gelu with tanh (1), and its slope */
static inline float act(float g, int gelu) {
    return gelu ? 0.5f * g * (1.0f + tangent(0.7978845608f * (g + 0.044715f * g * g * g))) : g / (1.0f + exponential(-g));
}
static inline float slope(float g, int gelu) {
    if (gelu) {
        float t = tangent(0.7978845608f * (g + 0.044715f * g * g * g));
        return 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * 0.7978845608f * (1.0f + 0.134145f * g * g);
    }
    float s = 1.0f / (1.0f + exponential(-g));
    return s * (1.0f + g * (1.0f - s));
}

/* out [n] = act(gate) * up, all in one line */
#define GATE(T, S) \
void gate_##S(const T *gate, const T *up, int64_t n, int gelu, T *out) { \
    if (gelu) { _Pragma("omp parallel for schedule(static)") \
        for (int64_t j = 0; j < n; j++) out[j] = narrow_##S(wide_##S(narrow_##S(act(wide_##S(gate[j]), 1))) * wide_##S(up[j])); } \
    else { _Pragma("omp parallel for schedule(static)") \
        for (int64_t j = 0; j < n; j++) out[j] = narrow_##S(wide_##S(narrow_##S(act(wide_##S(gate[j]), 0))) * wide_##S(up[j])); } \
}
EACH_TYPE(GATE)

#define GATE_BACKWARD(T, S) \
void gate_backward_##S(const T *dy, const T *gate, const T *up, int64_t n, int gelu, T *dgate, T *dup) { \
    if (gelu) { _Pragma("omp parallel for schedule(static)") \
        for (int64_t j = 0; j < n; j++) { float g = wide_##S(gate[j]), d = wide_##S(dy[j]); \
            dgate[j] = narrow_##S(d * wide_##S(up[j]) * slope(g, 1)); dup[j] = narrow_##S(d * act(g, 1)); } } \
    else { _Pragma("omp parallel for schedule(static)") \
        for (int64_t j = 0; j < n; j++) { float g = wide_##S(gate[j]), d = wide_##S(dy[j]); \
            dgate[j] = narrow_##S(d * wide_##S(up[j]) * slope(g, 0)); dup[j] = narrow_##S(d * act(g, 0)); } } \
}
EACH_TYPE(GATE_BACKWARD)

/* out [n, h] = act(both[:, :h]) * both[:, h:], act = silu (0) or gelu with tanh (1) */
#define GATED(T, S) \
void gated_##S(const T *both, int64_t n, int64_t h, int gelu, T *out) { \
    _Pragma("omp parallel for schedule(static) if(n > 1)") \
    for (int64_t i = 0; i < n; i++) { \
        const T *gate = both + 2 * i * h, *up = gate + h; T *row = out + i * h; \
        if (gelu) for (int64_t j = 0; j < h; j++) row[j] = narrow_##S(wide_##S(narrow_##S(act(wide_##S(gate[j]), 1))) * wide_##S(up[j])); \
        else for (int64_t j = 0; j < h; j++) row[j] = narrow_##S(wide_##S(narrow_##S(act(wide_##S(gate[j]), 0))) * wide_##S(up[j])); } \
}
EACH_TYPE(GATED)

/* One token a row. qkv [n, (H + 2 Hk) D]: queries and keys are normed (weights [(H + Hk), D], or NULL) and rotated (cos and
   sin [n, D], sin negated in its first half, or NULL) in place; key and value join slot i of k, v [rows, Hk, size, D] at
   length[i]; the row attends to its slot. out [n, H, D] and lse [n, H] in float, or narrow [n, H, D] where out is NULL. */
#define DECODE(T, S) \
void decode_##S(T *qkv, const float *weights, float epsilon, int late, const T *cosine, const T *sine, T *k, T *v, const int64_t *length, \
        int64_t n, int64_t heads, int64_t kv_heads, int64_t d, int64_t size, float scale, int64_t window, float cap, float *out, float *lse, T *narrow) { \
    int64_t groups = heads / kv_heads, all = heads + 2 * kv_heads, longest = 0; \
    for (int64_t i = 0; i < n; i++) longest = length[i] + 1 > longest ? length[i] + 1 : longest; \
    _Pragma("omp parallel") { \
    float *score = malloc(sizeof(float) * (groups * (longest + 2 * d) + 2 * d)), *query = score + groups * longest, *sum = query + groups * d, *old = sum + groups * d; \
    _Pragma("omp for schedule(static)") \
    for (int64_t w = 0; w < n * kv_heads; w++) { \
        int64_t i = w / kv_heads, c = w % kv_heads, end = length[i] + 1, low = window > 0 && end > window ? end - window : 0; \
        T *row = qkv + i * all * d, *keys = k + (i * kv_heads + c) * size * d, *values = v + (i * kv_heads + c) * size * d; \
        for (int64_t g = 0; g <= groups; g++) { /* the group's queries, then its key */ \
            int64_t at = g < groups ? c * groups + g : heads + c; T *x = row + at * d; \
            if (weights) norm_row_##S(x, weights + at * d, d, epsilon, late, x); \
            if (cosine) { const T *cs = cosine + i * d, *sn = sine + i * d; int64_t half = d / 2; \
                for (int64_t j = 0; j < d; j++) old[j] = wide_##S(x[j]); \
                for (int64_t j = 0; j < half; j++) { \
                    x[j] = narrow_##S(wide_##S(narrow_##S(old[j] * wide_##S(cs[j]))) + old[j + half] * wide_##S(sn[j])); \
                    x[j + half] = narrow_##S(wide_##S(narrow_##S(old[j + half] * wide_##S(cs[j + half]))) + old[j] * wide_##S(sn[j + half])); } } \
            if (g < groups) for (int64_t j = 0; j < d; j++) query[g * d + j] = wide_##S(x[j]) * scale; } \
        memcpy(keys + length[i] * d, row + (heads + c) * d, d * sizeof(T)); \
        memcpy(values + length[i] * d, row + (heads + kv_heads + c) * d, d * sizeof(T)); \
        for (int64_t p = low; p < end; p++) { const T *key = keys + p * d; \
            for (int64_t g = 0; g < groups; g++) { const float *q = query + g * d; float s = 0; \
                for (int64_t j = 0; j < d; j++) s += q[j] * wide_##S(key[j]); \
                score[g * longest + p] = cap > 0 ? cap * tangent(s / cap) : s; } } \
        for (int64_t g = 0; g < groups; g++) { float *s = score + g * longest, m = -INFINITY, t = 0, *o = sum + g * d; \
            for (int64_t p = low; p < end; p++) m = s[p] > m ? s[p] : m; \
            for (int64_t p = low; p < end; p++) { s[p] = exponential(s[p] - m); t += s[p]; } \
            for (int64_t j = 0; j < d; j++) o[j] = 0; \
            for (int64_t p = low; p < end; p++) { const T *value = values + p * d; float x = s[p]; \
                for (int64_t j = 0; j < d; j++) o[j] += x * wide_##S(value[j]); } \
            int64_t at = i * heads + c * groups + g; float r = 1.0f / t; \
            if (out) { lse[at] = m + logf(t); for (int64_t j = 0; j < d; j++) out[at * d + j] = o[j] * r; } \
            else for (int64_t j = 0; j < d; j++) narrow[at * d + j] = narrow_##S(o[j] * r); } } \
    free(score); } \
}
EACH_TYPE(DECODE)

/* log of a positive normal number, about 1 ulp: x = 2^e m, m in [sqrt 1/2, sqrt 2), a polynomial in m - 1 (Cephes logf) */
static inline float logarithm(float x) {
    int32_t b; memcpy(&b, &x, 4);
    int32_t e = ((b - 0x3f3504f3) >> 23);
    b -= e << 23; float m; memcpy(&m, &b, 4);
    float f = m - 1.0f, z = f * f, k = (float)e, y = 7.0376836292e-2f;
    y = y * f - 1.1514610310e-1f; y = y * f + 1.1676998740e-1f; y = y * f - 1.2420140846e-1f; y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f; y = y * f + 2.0000714765e-1f; y = y * f - 2.4999993993e-1f; y = y * f + 3.3333331174e-1f;
    y = y * f * z + k * -2.12194440e-4f - 0.5f * z;
    return f + y + k * 0.693359375f;
}
static inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull; x = (x ^ (x >> 27)) * 0x94D049BB133111EBull; return x ^ (x >> 31);
}
/* -log(-log1p(-u)); small u, which decide who wins, keep their relative precision */
static inline float gumbel(uint64_t bits) {
    float u = ((float)(int64_t)(bits & 0x7fffffffffffffffull) + 0.5f) * 1.0842021724855044e-19f;
    u = u > 0.99999994f ? 0.99999994f : u;
    float small = u + u * u * (0.5f + u * (1.0f / 3.0f + u * (0.25f + u * 0.2f))), large = -logarithm(1.0f - u);
    return -logarithm(u < 0.03f ? small : large);
}

/* log sum exp of x [v] */
static inline float lse_of(const float *x, int64_t v) {
    float top = largest_f32(x, 0, v), s = 0;
    for (int64_t j = 0; j < v; j++) s += exponential(x[j] - top);
    return top + logf(s);
}

/* argmax_j x[j] cold + Gumbel noise of (state, lane + j) */
static const uint64_t golden = 0x9E3779B97F4A7C15ull;
static inline int64_t loudest(const float *x, int64_t v, float cold, uint64_t state, uint64_t lane) {
    float best = -INFINITY; int64_t at = 0; float y[64];
    for (int64_t a = 0; a < v; a += 64) {
        int64_t w = v - a < 64 ? v - a : 64;
        for (int64_t j = 0; j < w; j++) y[j] = x[a + j] * cold + gumbel(mixed(state + (lane + (uint64_t)(a + j)) * golden));
        for (int64_t j = 0; j < w; j++) if (y[j] > best) { best = y[j]; at = a + j; } }
    return at;
}

/* tokens [m] = argmax_j z[row, j] / heat + Gumbel noise of (key, position, j), and their log-probabilities at heat 1 under z's own
   softmax; z [n, v] mapped logits in float. lse [n] is written. */
void draw_f32(const float *z, int64_t n, int64_t v, const int64_t *row, const int64_t *key, const int64_t *position, int64_t m, float heat,
              float *lse, int64_t *token, float *logprob) {
    _Pragma("omp parallel") {
    _Pragma("omp for schedule(static)")
    for (int64_t i = 0; i < n; i++) lse[i] = lse_of(z + i * v, v);
    _Pragma("omp for schedule(static)")
    for (int64_t i = 0; i < m; i++) {
        const float *x = z + row[i] * v;
        token[i] = loudest(x, v, 1.0f / heat, mixed((uint64_t)key[i] + (uint64_t)position[i] * golden), 0);
        logprob[i] = x[token[i]] - lse[row[i]]; } }
}

/* The same in two levels from `block_lse`'s own and warm [n, blocks]: the block, then the token in it, noise of lanes from `second` on.
   z [n, v] logits before the map. lse [n] is written. */
#define DRAW_BLOCKS(T, S) \
void draw_blocks_##S(const T *z, int64_t n, int64_t v, int64_t width, float scale, float cap, float heat, const float *own, const float *warm, \
                     const int64_t *row, const int64_t *key, const int64_t *position, int64_t m, int64_t second, \
                     float *lse, int64_t *token, float *logprob) { \
    int64_t blocks = (v + width - 1) / width; \
    for (int64_t i = 0; i < n; i++) lse[i] = lse_of(own + i * blocks, blocks); \
    _Pragma("omp parallel for schedule(static) if(m > 1)") \
    for (int64_t i = 0; i < m; i++) { \
        uint64_t state = mixed((uint64_t)key[i] + (uint64_t)position[i] * golden); \
        int64_t a = width * loudest(warm + row[i] * blocks, blocks, 1.0f, state, 0), w = v - a < width ? v - a : width; \
        const T *x = z + row[i] * v + a; float y[width]; \
        for (int64_t j = 0; j < w; j++) y[j] = mapped(wide_##S(x[j]), scale, cap, heat); \
        int64_t at = loudest(y, w, 1.0f, state, (uint64_t)second); \
        token[i] = a + at; logprob[i] = mapped(wide_##S(x[at]), scale, cap, 1.0f) - lse[row[i]]; } \
}
EACH_TYPE(DRAW_BLOCKS)

/* y [n, all] = x [n, in] W^T (+ bias), n at most 4, of several weights [out, in] that read the same rows, side by side in y. Such a
   product is bound by reading the weights: each thread walks several places of its share at once and asks for what lies a kilobyte
   ahead, which keeps more of memory busy than one walk does. Sums in float, vectors of 16. */
#define AHEAD 1024
typedef float vector __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
static inline vector sixteen_f32(const float *x) { vector y; memcpy(&y, x, 64); return y; }
static inline vector sixteen_bf16(const bf16 *x) {
    halves h; memcpy(&h, x, 32);
    bits b = __builtin_convertvector(h, bits) << 16; vector y; memcpy(&y, &b, 64); return y;
}
static inline float across(vector v) { float s = 0; for (int l = 0; l < 16; l++) s += v[l]; return s; }

/* T, S: the weights' type and name; X, XS: that of rows, biases and results; NAME: of the pair */
#define FEW(T, S, X, XS, NAME, N, K) \
static void few_##N##_##NAME(const float *x, int64_t in, const T *w, const X *bias, int64_t a, int64_t b, X *y, int64_t all) { \
    int64_t apart = (b - a) / K, whole = in / 32 * 32; \
    for (int64_t i = 0; i < apart; i++) { \
        const T *row = w + (a + i) * in; vector sum[K][N]; \
        for (int k = 0; k < K; k++) for (int m = 0; m < N; m++) sum[k][m] = (vector){0}; \
        for (int64_t j = 0; j < whole; j += 32) \
            for (int k = 0; k < K; k++) { \
                const T *at = row + k * apart * in + j; vector left = sixteen_##S(at), right = sixteen_##S(at + 16); \
                __builtin_prefetch((const char *)at + AHEAD); \
                if (sizeof(T) == 4) __builtin_prefetch((const char *)at + AHEAD + 64); \
                for (int m = 0; m < N; m++) sum[k][m] += left * sixteen_f32(x + m * in + j) + right * sixteen_f32(x + m * in + j + 16); } \
        for (int k = 0; k < K; k++) for (int m = 0; m < N; m++) { \
            int64_t o = a + k * apart + i; float s = across(sum[k][m]); \
            for (int64_t j = whole; j < in; j++) s += x[m * in + j] * wide_##S(w[o * in + j]); \
            y[m * all + o] = narrow_##XS(bias ? s + wide_##XS(bias[o]) : s); } } \
    for (int64_t o = a + K * apart; o < b; o++) for (int m = 0; m < N; m++) { \
        float s = 0; for (int64_t j = 0; j < in; j++) s += x[m * in + j] * wide_##S(w[o * in + j]); \
        y[m * all + o] = narrow_##XS(bias ? s + wide_##XS(bias[o]) : s); } \
}
#define FEW_EACH(T, S, X, XS, NAME) FEW(T, S, X, XS, NAME, 1, 8) FEW(T, S, X, XS, NAME, 2, 4) FEW(T, S, X, XS, NAME, 3, 4) FEW(T, S, X, XS, NAME, 4, 4)

#define FEW_ROWS(T, S, X, XS, NAME) \
FEW_EACH(T, S, X, XS, NAME) \
void few_rows_##NAME(const X *x, int64_t n, int64_t in, int64_t parts, const T *const *weights, const X *const *biases, const int64_t *outs, X *y) { \
    int64_t all = 0; for (int64_t p = 0; p < parts; p++) all += outs[p]; \
    float *wide = malloc(sizeof(float) * n * in); \
    for (int64_t j = 0; j < n * in; j++) wide[j] = wide_##XS(x[j]); \
    _Pragma("omp parallel") { \
        int64_t threads = omp_get_num_threads(), me = omp_get_thread_num(), at = 0; \
        for (int64_t p = 0; p < parts; at += outs[p++]) { \
            int64_t a = outs[p] * me / threads, b = outs[p] * (me + 1) / threads; \
            switch (n) { \
                case 1: few_1_##NAME(wide, in, weights[p], biases[p], a, b, y + at, all); break; \
                case 2: few_2_##NAME(wide, in, weights[p], biases[p], a, b, y + at, all); break; \
                case 3: few_3_##NAME(wide, in, weights[p], biases[p], a, b, y + at, all); break; \
                default: few_4_##NAME(wide, in, weights[p], biases[p], a, b, y + at, all); } } } \
    free(wide); \
}
FEW_ROWS(float, f32, float, f32, f32)
FEW_ROWS(bf16, bf16, bf16, bf16, bf16)
FEW_ROWS(bf16, bf16, float, f32, halved_f32)

/* One AdamW step (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2) of a float32 master that is kept as the bfloat16 weight nearest
   to it, `high`, and the signed 16 bits `low` by which their bit patterns differ. `divide` clips the gradient; c1 and c2 are
   1 - beta1^t and sqrt(1 - beta2^t). All [n]. */
void adamw_bf16(bf16 *high, int16_t *low, const float *gradient, float *first, float *second, int64_t n, float rate, float beta1, float beta2,
                float epsilon, float decay, float c1, float c2, float divide) {
    float keep = 1.0f - rate * decay, pace = rate / c1;
    _Pragma("omp parallel for schedule(static)")
    for (int64_t j = 0; j < n; j++) {
        float g = gradient[j] / divide, m = first[j], v = second[j];
        int32_t b = (int32_t)((uint32_t)high[j] << 16) + low[j]; float w; memcpy(&w, &b, 4);
        m += (g - m) * (1.0f - beta1); v = v * beta2 + (1.0f - beta2) * g * g;
        first[j] = m; second[j] = v;
        w = w * keep - pace * m / (sqrtf(v) / c2 + epsilon);
        memcpy(&b, &w, 4);
        int32_t h = (b + 0x8000) >> 16; /* half away from zero: then what is left always fits */
        high[j] = (bf16)h; low[j] = (int16_t)(b - (h << 16)); }
}
