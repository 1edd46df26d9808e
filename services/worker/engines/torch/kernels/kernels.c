/* The CPU's hot loops: linear layers, paged attention, and what lies between them.
 *
 * Portable C with GCC's vector extension (GCC, Clang); OpenMP over outputs. Knows
 * pointers and strides, no torch. Tensors are row-major, sizes count elements.
 *
 * Every output element is one sum in one fixed order: over k for a product, over
 * positions in tiles of TILE counted from the sequence's start for attention. Which
 * rows a call holds, how they are cut into register blocks and how many threads
 * share them decides who computes an element, never how. So results are
 * bit-identical in any batch and any chunking.
 *
 * bfloat16 weights and KV are widened when read (a shift); all sums are float32.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t u8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t h8 __attribute__((vector_size(16), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LOAD(p) (*(const v8 *)(p))
#define STORE(p, v) (*(v8 *)(p) = (v))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

INLINE v8 splat(float x) { return (v8){x, x, x, x, x, x, x, x}; }
INLINE v8 as_float(u8 bits) { return (v8)bits; }
INLINE v8 widen(const uint16_t *p) {
    return as_float(__builtin_convertvector(*(const h8 *)p, u8) << 16);
}
INLINE uint16_t narrow(float x) { /* round to nearest even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

INLINE v8 choose(i8 mask, v8 a, v8 b) { return as_float((u8)(((i8)a & mask) | ((i8)b & ~mask))); }

/* exp by range reduction and a polynomial of degree 6, to 2 units in the last place. */
INLINE v8 exp8(v8 x) {
    x = choose(x < -87.0f, splat(-87.0f), x);
    x = choose(x > 88.0f, splat(88.0f), x);
    v8 half = choose(x < 0.0f, splat(-0.5f), splat(0.5f));
    i8 n = __builtin_convertvector(x * 1.44269504f + half, i8);
    v8 whole = __builtin_convertvector(n, v8);
    v8 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    v8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * as_float((u8)(n + 127) << 23);
}
INLINE float exp1(float x) { return exp8(splat(x))[0]; }
INLINE float total(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE float largest(v8 x) {
    float a = MAX(MAX(x[0], x[1]), MAX(x[2], x[3])), b = MAX(MAX(x[4], x[5]), MAX(x[6], x[7]));
    return MAX(a, b);
}

/* ---- y = x Wᵀ -------------------------------------------------------------
 *
 * W, [columns, K], is kept in panels of 16 columns, [panels, K, 16], the last one
 * filled up with zeros. A bfloat16 panel keeps columns i and i + 8 in the halves of
 * one 32-bit word: one load, a shift and a mask give two vectors.
 */

typedef struct {
    const float *x;
    float *y;
    const void *w;
    int64_t rows, K, columns, x_stride, y_stride;
} Product;

INLINE void panel_row(const void *w, int64_t k, int is_bf16, v8 *low, v8 *high) {
    if (is_bf16) {
        u8 both = *(const u8 *)((const uint16_t *)w + k * 16);
        *low = as_float(both << 16);
        *high = as_float(both & 0xffff0000u);
    } else {
        *low = LOAD((const float *)w + k * 16);
        *high = LOAD((const float *)w + k * 16 + 8);
    }
}

/* R rows by C panels, R · C · 2 sums in registers. */
INLINE void product_block(const Product *a, int64_t row, int64_t panel, int is_bf16, int R, int C) {
    const int64_t K = a->K, panel_size = K * 16 * (is_bf16 ? 2 : 4);
    const float *x = a->x + row * a->x_stride;
    const char *w = (const char *)a->w + panel * panel_size;
    v8 sum[R][C][2];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sum[r][c][0] = sum[r][c][1] = splat(0);
    for (int64_t k = 0; k < K; k++) {
        UNROLL for (int c = 0; c < C; c++) {
            v8 low, high;
            panel_row(w + c * panel_size, k, is_bf16, &low, &high);
            UNROLL for (int r = 0; r < R; r++) {
                v8 factor = splat(x[r * a->x_stride + k]);
                sum[r][c][0] += factor * low;
                sum[r][c][1] += factor * high;
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) {
            int64_t column = (panel + c) * 16;
            float *y = a->y + (row + r) * a->y_stride + column;
            if (column + 16 <= a->columns) {
                STORE(y, sum[r][c][0]);
                STORE(y + 8, sum[r][c][1]);
            } else {
                float last[16];
                STORE(last, sum[r][c][0]);
                STORE(last + 8, sum[r][c][1]);
                memcpy(y, last, (size_t)(a->columns - column) * sizeof(float));
            }
        }
}

/* All rows from `row` to `end` by C panels. */
#define SWEEP(C)                                                                     \
    for (; row + 6 <= end; row += 6) {                                               \
        UNROLL for (int c = 0; c < C; c++) product_block(a, row, panel + c, is_bf16, 6, 1); \
    }                                                                                \
    switch (end - row) {                                                             \
    case 5: UNROLL for (int c = 0; c < C; c++) product_block(a, row, panel + c, is_bf16, 5, 1); break; \
    case 4: UNROLL for (int c = 0; c < C; c++) product_block(a, row, panel + c, is_bf16, 4, 1); break; \
    case 3: UNROLL for (int c = 0; c < C; c += (C > 1 ? 2 : 1)) product_block(a, row, panel + c, is_bf16, 3, C > 1 ? 2 : 1); break; \
    case 2: UNROLL for (int c = 0; c < C; c += (C > 1 ? 2 : 1)) product_block(a, row, panel + c, is_bf16, 2, C > 1 ? 2 : 1); break; \
    case 1: product_block(a, row, panel, is_bf16, 1, C); break;                      \
    }

INLINE void product_panels(const Product *a, int64_t first, int64_t last, int is_bf16) {
    /* Rows in chunks that stay in the second-level cache while all panels pass. */
    const int64_t chunk = MAX(6, (1 << 16) / a->K / 6 * 6);
    for (int64_t start = 0; start < a->rows; start += chunk) {
        const int64_t end = MIN(start + chunk, a->rows);
        int64_t panel = first;
        for (; panel + 4 <= last; panel += 4) {
            int64_t row = start;
            SWEEP(4)
        }
        for (; panel < last; panel++) {
            int64_t row = start;
            SWEEP(1)
        }
    }
}

static void product_float(const Product *a, int64_t first, int64_t last) {
    product_panels(a, first, last, 0);
}
static void product_bf16(const Product *a, int64_t first, int64_t last) {
    product_panels(a, first, last, 1);
}

/* x [rows, K] -> y [rows, columns], w packed by `pack`. */
void linear(const float *x, int64_t x_stride, const void *w, int is_bf16, int64_t rows, int64_t K,
            int64_t columns, float *y, int64_t y_stride) {
    const Product a = {x, y, w, rows, K, columns, x_stride, y_stride};
    const int64_t panels = (columns + 15) / 16, share = 8;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < panels; first += share) {
        int64_t last = MIN(first + share, panels);
        if (is_bf16) product_bf16(&a, first, last);
        else product_float(&a, first, last);
    }
}

/* w [columns, K] -> packed [ceil(columns / 16), K, 16]. */
void pack(const void *w, void *packed, int is_bf16, int64_t columns, int64_t K) {
    const int64_t panels = (columns + 15) / 16;
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < 16; i++) {
            const int64_t column = panel * 16 + i, at = panel * K * 16;
            for (int64_t k = 0; k < K; k++) {
                if (is_bf16)
                    ((uint16_t *)packed)[at + k * 16 + (i < 8 ? 2 * i : 2 * (i - 8) + 1)] =
                        column < columns ? ((const uint16_t *)w)[column * K + k] : 0;
                else
                    ((float *)packed)[at + k * 16 + i] =
                        column < columns ? ((const float *)w)[column * K + k] : 0;
            }
        }
}

/* ---- attention over the paged cache ----------------------------------------
 *
 * A layer's cache is [2 · kv_heads, num_slots, D], keys first. A tile of queries is
 * four numbers: its first row, its rows, the position of the first, and where its
 * sequence's blocks begin in `blocks`.
 */

enum { TILE = 16, ROWS = 32, MAX_D = 512, MAX_GROUP = 64 };

typedef struct {
    int64_t row, rows, position, table;
} Queries;

typedef struct {
    const float *query;
    float *out;
    void *cache;
    int is_bf16;
    int64_t query_stride, heads, kv_heads, D, num_slots, block_size, window;
    const int32_t *blocks;
    float scale, soft_cap;
} Attention;

INLINE void transpose8(v8 *m) {
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
    v8 t[8], s[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = SHUFFLE(m[i], m[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[i + 1] = SHUFFLE(m[i], m[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            s[i + j] = SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            s[i + j + 2] = SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        m[j] = SHUFFLE(s[j], s[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        m[j + 4] = SHUFFLE(s[j], s[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

INLINE v8 stored8(const void *row, int64_t d, int is_bf16) {
    return is_bf16 ? widen((const uint16_t *)row + d) : LOAD((const float *)row + d);
}

/* Keys from .. to of the tile at `start` as [D][TILE], the rest zero; their values' rows. */
INLINE void read_tile(const Attention *a, const Queries *q, int64_t head, int64_t start, int from,
                      int to, float *keys, const float **values, float *widened, int is_bf16) {
    const int64_t D = a->D, size = is_bf16 ? 2 : 4;
    const char *rows[TILE];
    const char *k_base = (const char *)a->cache + head * a->num_slots * D * size;
    const char *v_base = k_base + a->kv_heads * a->num_slots * D * size;
    for (int j = from; j < to; j++) {
        const int64_t position = start + j, block = position / a->block_size;
        const int64_t slot = (int64_t)a->blocks[q->table + block] * a->block_size +
                             position % a->block_size;
        const char *value = v_base + slot * D * size;
        rows[j] = k_base + slot * D * size;
        values[j] = is_bf16 ? widened + j * D : (const float *)value;
        if (is_bf16)
            for (int64_t d = 0; d < D; d += 8)
                STORE(widened + j * D + d, widen((const uint16_t *)value + d));
    }
    for (int half = 0; half < TILE; half += 8)
        for (int64_t d = 0; d < D; d += 8) {
            v8 m[8];
            UNROLL for (int i = 0; i < 8; i++)
                m[i] = half + i >= from && half + i < to ? stored8(rows[half + i], d, is_bf16)
                                                         : splat(0);
            transpose8(m);
            UNROLL for (int i = 0; i < 8; i++) STORE(keys + (d + i) * TILE + half, m[i]);
        }
}

/* Scores of Q queries and TILE keys, before scaling. */
INLINE void score(const float *const *query, const float *keys, int64_t D, float *scores, int Q) {
    v8 sum[Q][2];
    UNROLL for (int i = 0; i < Q; i++) sum[i][0] = sum[i][1] = splat(0);
    for (int64_t d = 0; d < D; d++) {
        v8 low = LOAD(keys + d * TILE), high = LOAD(keys + d * TILE + 8);
        UNROLL for (int i = 0; i < Q; i++) {
            v8 factor = splat(query[i][d]);
            sum[i][0] += factor * low;
            sum[i][1] += factor * high;
        }
    }
    UNROLL for (int i = 0; i < Q; i++) {
        STORE(scores + i * TILE, sum[i][0]);
        STORE(scores + i * TILE + 8, sum[i][1]);
    }
}

/* out = out · keep + Σ weight[j] · values[j], W vectors at d. */
INLINE void mix(float *out, float keep, const float *weights, const float **values, int from,
                int to, int64_t d, int W) {
    v8 sum[W];
    UNROLL for (int i = 0; i < W; i++) sum[i] = LOAD(out + d + 8 * i) * keep;
    for (int j = from; j < to; j++) {
        v8 weight = splat(weights[j]);
        const float *value = values[j] + d;
        UNROLL for (int i = 0; i < W; i++) sum[i] += weight * LOAD(value + 8 * i);
    }
    UNROLL for (int i = 0; i < W; i++) STORE(out + d + 8 * i, sum[i]);
}

/* One query's softmax and sum go on by the tile's keys from .. to (online softmax,
 * https://arxiv.org/abs/2205.14135). */
INLINE void accumulate(const Attention *a, float *scores, const float **values, int from, int to,
                       float *best, float *mass, float *out) {
    v8 s[2] = {LOAD(scores) * a->scale, LOAD(scores + 8) * a->scale};
    if (a->soft_cap > 0 || from > 0 || to < TILE) {
        STORE(scores, s[0]);
        STORE(scores + 8, s[1]);
        for (int j = 0; j < TILE; j++) {
            if (a->soft_cap > 0) scores[j] = tanhf(scores[j] / a->soft_cap) * a->soft_cap;
            if (j < from || j >= to) scores[j] = -INFINITY;
        }
        s[0] = LOAD(scores);
        s[1] = LOAD(scores + 8);
    }
    const float top = MAX(*best, MAX(largest(s[0]), largest(s[1])));
    const float keep = *best == top ? 1.0f : exp1(*best - top);
    const v8 none = splat(0);
    v8 w[2];
    for (int i = 0; i < 2; i++) {
        w[i] = exp8(s[i] - top);
        w[i] = choose(s[i] == splat(-INFINITY), none, w[i]);
        STORE(scores + 8 * i, w[i]);
    }
    *mass = *mass * keep + total(w[0] + w[1]);
    *best = top;
    int64_t d = 0;
    for (; d + 64 <= a->D; d += 64) mix(out, keep, scores, values, from, to, d, 8);
    for (; d < a->D; d += 8) mix(out, keep, scores, values, from, to, d, 1);
}

INLINE void attend_tile(const Attention *a, const Queries *q, int64_t head, int is_bf16) {
    const int64_t D = a->D, group = a->heads / a->kv_heads, count = q->rows * group;
    float keys[MAX_D * TILE], widened[is_bf16 ? MAX_D * TILE : 1];
    const float *values[TILE];
    float best[ROWS * MAX_GROUP], mass[ROWS * MAX_GROUP];
    for (int64_t i = 0; i < count; i++) {
        best[i] = -INFINITY;
        mass[i] = 0;
        float *out = a->out + ((q->row + i / group) * a->heads + head * group + i % group) * D;
        memset(out, 0, (size_t)D * sizeof(float));
    }
    const int64_t end = q->position + q->rows;
    /* What lies before `begin` may be gone. */
    const int64_t begin = a->window > 0 ? MAX(0, q->position - a->window + 1) : 0;
    for (int64_t start = begin / TILE * TILE; start < end; start += TILE) {
        read_tile(a, q, head, start, (int)MAX(0, begin - start), (int)MIN(TILE, end - start), keys,
                  values, widened, is_bf16);
        for (int64_t i = 0; i < count;) {
            float scores[4 * TILE];
            const float *query[4];
            const int together = (int)MIN(4, count - i);
            for (int n = 0; n < together; n++)
                query[n] = a->query + (q->row + (i + n) / group) * a->query_stride +
                           (head * group + (i + n) % group) * D;
            switch (together) {
            case 4: score(query, keys, D, scores, 4); break;
            case 3: score(query, keys, D, scores, 3); break;
            case 2: score(query, keys, D, scores, 2); break;
            case 1: score(query, keys, D, scores, 1); break;
            }
            for (int n = 0; n < together; n++, i++) {
                const int64_t position = q->position + i / group;
                const int64_t least = a->window > 0 ? position - a->window + 1 : 0;
                const int from = (int)MAX(0, least - start), to = (int)MIN(TILE, position + 1 - start);
                if (from >= to) continue;
                float *out = a->out + ((q->row + i / group) * a->heads + head * group + i % group) * D;
                accumulate(a, scores + n * TILE, values, from, to, &best[i], &mass[i], out);
            }
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float *out = a->out + ((q->row + i / group) * a->heads + head * group + i % group) * D;
        for (int64_t d = 0; d < D; d += 8) STORE(out + d, LOAD(out + d) / mass[i]);
    }
}

static void attend_float(const Attention *a, const Queries *q, int64_t head) {
    attend_tile(a, q, head, 0);
}
static void attend_bf16(const Attention *a, const Queries *q, int64_t head) {
    attend_tile(a, q, head, 1);
}

/* Tiles of queries [num_tiles] over the cache; query and out [tokens, heads, D].
 * window 0: none; soft_cap 0: none. D is a multiple of 8, at most MAX_D; heads per kv
 * head at most MAX_GROUP; rows of a tile at most ROWS. */
void attend(const float *query, int64_t query_stride, float *out, void *cache, int is_bf16,
            int64_t heads, int64_t kv_heads, int64_t D, int64_t num_slots, int64_t block_size,
            const Queries *tiles, int64_t num_tiles, const int32_t *blocks, int64_t window,
            float scale, float soft_cap) {
    const Attention a = {query, out, cache, is_bf16, query_stride, heads, kv_heads, D, num_slots,
                         block_size, window, blocks, scale, soft_cap};
    /* The last tiles of a prefill see most: they begin. */
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = num_tiles * kv_heads - 1; i >= 0; i--) {
        if (is_bf16) attend_bf16(&a, tiles + i / kv_heads, i % kv_heads);
        else attend_float(&a, tiles + i / kv_heads, i % kv_heads);
    }
}

/* Rows [tokens, 2 · kv_heads, D] into the cache at `slots` [tokens]. */
void store(const float *rows, int64_t stride, void *cache, int is_bf16, int64_t tokens,
           int64_t num_heads, int64_t D, int64_t num_slots, const int64_t *slots) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t head = 0; head < num_heads; head++) {
            const float *row = rows + t * stride + head * D;
            const int64_t at = (head * num_slots + slots[t]) * D;
            if (is_bf16)
                for (int64_t d = 0; d < D; d++) ((uint16_t *)cache)[at + d] = narrow(row[d]);
            else
                memcpy((float *)cache + at, row, (size_t)D * sizeof(float));
        }
}

/* ---- what lies between: one row after the other ------------------------------ */

enum { SMALL = 16384 }; /* Elements below which a second thread costs more than it does. */

/* y = x / sqrt(mean(x²) + eps) · weight over rows of E, a multiple of 8. */
void rms_norm(const float *x, int64_t x_stride, const float *weight, float *y, int64_t rows,
              int64_t E, float eps) {
#pragma omp parallel for if (rows * E > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * x_stride;
        v8 squares = splat(0);
        for (int64_t i = 0; i < E; i += 8) squares += LOAD(from + i) * LOAD(from + i);
        const float factor = 1.0f / sqrtf(total(squares) / (float)E + eps);
        for (int64_t i = 0; i < E; i += 8)
            STORE(y + r * E + i, LOAD(from + i) * factor * LOAD(weight + i));
    }
}

/* y = activate(x[:, :F]) · x[:, F:], F a multiple of 8. SiLU is g · sigmoid(g); GELU in its
 * tanh form is g · sigmoid(2u), u = sqrt(2 / pi) (g + 0.044715 g³). */
void gate(const float *x, float *y, int64_t rows, int64_t F, int is_gelu) {
#pragma omp parallel for if (rows * F > SMALL)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < F; i += 8) {
            v8 g = LOAD(x + r * 2 * F + i);
            v8 u = g;
            if (is_gelu) u *= (1.0f + 0.044715f * g * g) * 1.5957691216f;
            STORE(y + r * F + i, g / (1.0f + exp8(-u)) * LOAD(x + r * 2 * F + F + i));
        }
}

/* Rotations of positions [tokens] by frequencies [half], both halves of 2 · half alike,
 * scaled by factor; the first half of the sines is negative. */
void angles(const int64_t *positions, const float *frequencies, int64_t tokens, int64_t half,
            float factor, float *cosines, float *sines) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < half; i++) {
            const float angle = (float)positions[t] * frequencies[i];
            float *c = cosines + t * 2 * half + i, *s = sines + t * 2 * half + i;
            c[0] = c[half] = cosf(angle) * factor;
            s[half] = sinf(angle) * factor;
            s[0] = -s[half];
        }
}

/* Heads [tokens, heads, D] in place: the first R elements of each, i with i + R/2, by
 * cosines and signed sines [tokens, R]; R is a multiple of 16. */
void rotate(float *x, int64_t stride, int64_t tokens, int64_t heads, int64_t D, int64_t R,
            const float *cosines, const float *sines) {
#pragma omp parallel for if (tokens * heads * R > SMALL)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t head = 0; head < heads; head++) {
            float *low = x + t * stride + head * D, *high = low + R / 2;
            const float *c = cosines + t * R, *s = sines + t * R;
            for (int64_t i = 0; i < R / 2; i += 8) {
                v8 a = LOAD(low + i), b = LOAD(high + i);
                STORE(low + i, a * LOAD(c + i) + b * LOAD(s + i));
                STORE(high + i, b * LOAD(c + R / 2 + i) + a * LOAD(s + R / 2 + i));
            }
        }
}
