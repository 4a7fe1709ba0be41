/* 量化权重的乘法 y = x·Wᵀ + b：权重按 (O, I) 原样读一遍，不另存一份。
 *
 * 一行就是一行：每个 (行, 输出) 的运算次序固定，与同批的行、线程数、怎样分块无关。
 * 整数格式把 x 的每一行按自己的尺度取整成 int16，乘积在 int32 里精确相加，所以 int8 的结果
 * 在各指令集上逐位相同；取 int16 而不取 int8，是因为 AVX2 的 maddubs 会在 16 位里饱和，
 * 而 madd(int16) 不会，也更准。浮点不许编译器自行并成乘加（-ffp-contract=off）。
 *
 * R 行数、I 输入宽、O 输出数、G = I / group。
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(GPT2_GENERIC)
#define VECTORS 1
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

enum { FP16 = 0, INT8 = 1, INT4 = 2 };
enum { MAX_GROUPS = 1024, TILE_ROWS = 3, BLOCK_ROWS = 192, CHUNK_BYTES = 1 << 17 };

typedef struct {
    int64_t kind, outs, width, group;
    const void *codes;   /* FP16 (O, I) 半精度；INT8 (O, I)；INT4 (O, I/2)，低四位是偶数列 */
    const void *scale;   /* INT8 (O,) float；INT4 (O, G) 半精度 */
    const float *offset; /* INT4 (O, G) 加在每个 (码 - 8)·scale 上；NULL = 没有 */
} Weight;

typedef struct {
    const Weight *w;
    const float *bias; /* (O,)；NULL = 没有 */
    const float *x;  /* (R, I) */
    float *y;        /* (R, O) */
    int16_t *q;      /* (R, padded)：取整后的 x，末尾补零 */
    float *q_scale;  /* (R,) */
    float *q_sums;   /* (R, G)：各组 q 之和，只有 offset 要 */
    int64_t padded, groups;
    int level;       /* q 的最大绝对值 */
} Job;

#define INLINE static inline __attribute__((always_inline))
#define TILE(name)                                                                             \
    INLINE void name(const Job *j, const int64_t *row, const int64_t *out, const int R, const int O)
#define UNROLL _Pragma("GCC unroll 8")

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = h & 0x7fff, out;
    float f;
    if (bits >= 0x7c00) {
        out = sign | 0x7f800000u | (bits & 0x3ff) << 13;
    } else if (bits >= 0x400) {
        out = sign | ((bits << 13) + (112u << 23));
    } else {
        f = (float)bits * 0x1p-24f;
        memcpy(&out, &f, 4);
        out |= sign;
    }
    memcpy(&f, &out, 4);
    return f;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void put(const Job *j, int64_t row, int64_t out, float value) {
    j->y[row * j->w->outs + out] = j->bias ? value + j->bias[out] : value;
}

#ifdef VECTORS
#include "native_x86.h"
#else
/* ---- 别的 CPU：同样的和，写成编译器自己会向量化的循环 ---- */
enum { TILE_OUTS = 4, LANES = 16, TILE_OUTS4 = 4 };

TILE(tile_int8) {
    const int64_t width = j->w->width;
    for (int o = 0; o < O; o++)
        for (int r = 0; r < R; r++) {
            const int8_t *c = (const int8_t *)j->w->codes + out[o] * width;
            const int16_t *q = j->q + row[r] * j->padded;
            int32_t sum = 0;
            for (int64_t i = 0; i < width; i++) sum += (int16_t)c[i] * q[i];
            float scale = ((const float *)j->w->scale)[out[o]];
            put(j, row[r], out[o], (float)sum * (j->q_scale[row[r]] * scale));
        }
}

TILE(tile_fp16) {
    const int64_t width = j->w->width;
    for (int o = 0; o < O; o++)
        for (int r = 0; r < R; r++) {
            const uint16_t *c = (const uint16_t *)j->w->codes + out[o] * width;
            const float *x = j->x + row[r] * width;
            float sum[8] = {0};
            for (int64_t i = 0; i < width; i++) sum[i & 7] += half_to_float(c[i]) * x[i];
            put(j, row[r], out[o],
                ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7])));
        }
}

TILE(tile_int4) {
    const Weight *w = j->w;
    for (int o = 0; o < O; o++)
        for (int r = 0; r < R; r++) {
            const uint8_t *c = (const uint8_t *)w->codes + out[o] * (w->width / 2);
            const int16_t *q = j->q + row[r] * j->padded;
            const uint16_t *scale = (const uint16_t *)w->scale + out[o] * j->groups;
            float value = 0, offset = 0;
            for (int64_t g = 0; g < j->groups; g++) {
                int32_t sum = 0;
                for (int64_t i = g * w->group; i < (g + 1) * w->group; i += 32)
                    for (int64_t k = 0; k < 16; k++)
                        sum += ((c[i / 2 + k] & 15) - 8) * q[i + k]
                               + ((c[i / 2 + k] >> 4) - 8) * q[i + 16 + k];
                value += (float)sum * half_to_float(scale[g]);
                if (w->offset)
                    offset += w->offset[out[o] * j->groups + g]
                              * j->q_sums[row[r] * j->groups + g];
            }
            put(j, row[r], out[o], (value + offset) * j->q_scale[row[r]]);
        }
}
#endif

/* 一行 x 取整：尺度是这一行自己的。有 NaN 或无穷的一行，结果整行是 NaN，不是悄悄的数。 */
static void quantize_row(Job *j, int64_t row) {
    const int64_t width = j->w->width;
    const float *x = j->x + row * width;
    int16_t *q = j->q + row * j->padded;
    int32_t top = 0, bits;
    for (int64_t i = 0; i < width; i++) {
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float most, level = (float)j->level;
    memcpy(&most, &top, 4);
    int finite = top < 0x7f800000;
    float inverse = finite && most > 1e-30f ? level / most : 0.0f;
    j->q_scale[row] = most > 1e-30f || !finite ? (finite ? most / level : 0.0f / 0.0f) : 0.0f;
    /* 加减 1.5·2²³：就近取整、平局取偶，哪个指令集都向量化得了。 */
    const float magic = 12582912.0f;
    if (!finite) {
        memset(q, 0, (size_t)j->padded * sizeof(int16_t));
    } else if (j->w->kind == INT8) {
        for (int64_t i = 0; i < width; i++)
            q[i] = (int16_t)(int32_t)(x[i] * inverse + magic - magic);
        memset(q + width, 0, (size_t)(j->padded - width) * sizeof(int16_t));
    } else {
        for (int64_t i = 0; i < width; i += 32)
            for (int64_t k = 0; k < 16; k++) {
                q[i + k] = (int16_t)(int32_t)(x[i + 2 * k] * inverse + magic - magic);
                q[i + 16 + k] = (int16_t)(int32_t)(x[i + 2 * k + 1] * inverse + magic - magic);
            }
    }
    if (j->q_sums)
        for (int64_t g = 0; g < j->groups; g++) {
            int32_t sum = 0;
            for (int64_t i = g * j->w->group; i < (g + 1) * j->w->group; i++) sum += q[i];
            j->q_sums[row * j->groups + g] = (float)sum;
        }
}

/* 三行一块或一行一块。不满一块时最后的行与输出重复算几遍：写的是同样的数。 */
#define SWEEP(name, tile, OUTS)                                                                \
    static void name(const Job *j, int64_t rows, int64_t begin, int64_t end, int64_t chunk) {  \
        for (int64_t from = begin; from < end; from += chunk) {                                \
            int64_t to = least(from + chunk, end);                                             \
            for (int64_t r = 0; r < rows; r += TILE_ROWS) {                                    \
                int64_t row[TILE_ROWS], out[OUTS];                                             \
                for (int k = 0; k < TILE_ROWS; k++) row[k] = least(r + k, rows - 1);           \
                for (int64_t at = from; at < to; at += OUTS) {                                 \
                    for (int k = 0; k < OUTS; k++) out[k] = least(at + k, to - 1);             \
                    if (r + 1 < rows) tile(j, row, out, TILE_ROWS, OUTS);                      \
                    else tile(j, row, out, 1, OUTS);                                           \
                }                                                                              \
            }                                                                                  \
        }                                                                                      \
    }
SWEEP(sweep_fp16, tile_fp16, TILE_OUTS)
SWEEP(sweep_int8, tile_int8, TILE_OUTS)
SWEEP(sweep_int4, tile_int4, TILE_OUTS4)

/* 这个线程的那一段输出，边界取 8 的倍数：零头只在最后一个线程。 */
static void work(const Job *j, int64_t rows, int thread, int threads) {
    const Weight *w = j->w;
    int64_t tiles = (w->outs + 7) / 8;
    int64_t begin = tiles * thread / threads * 8, end = tiles * (thread + 1) / threads * 8;
    if (end > w->outs) end = w->outs;
    int64_t chunk = CHUNK_BYTES / w->width * (w->kind == INT4 ? 2 : 1) / 8 * 8;
    if (chunk < 8) chunk = 8;
    if (w->kind == FP16) sweep_fp16(j, rows, begin, end, chunk);
    else if (w->kind == INT8) sweep_int8(j, rows, begin, end, chunk);
    else sweep_int4(j, rows, begin, end, chunk);
}

static void run(Job *j, int64_t rows, int threads) {
    int quantized = j->w->kind != FP16;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            if (quantized) {
#pragma omp for schedule(static)
                for (int64_t r = 0; r < rows; r++) quantize_row(j, r);
            }
            work(j, rows, omp_get_thread_num(), omp_get_num_threads());
        }
        return;
    }
#endif
    (void)threads;
    for (int64_t r = 0; quantized && r < rows; r++) quantize_row(j, r);
    work(j, rows, 0, 1);
}

/* y (R, O) = x (R, I)·Wᵀ + bias。0 = 成功，1 = 没有内存。 */
int gpt2_product(const Weight *w, const float *x, int64_t rows, const float *bias, float *y,
                 int threads) {
    Job job = {.w = w, .bias = bias};
    char *scratch = NULL;
    int64_t block = rows < BLOCK_ROWS ? rows : BLOCK_ROWS;
    if (w->kind != FP16) {
        job.groups = w->kind == INT4 ? w->width / w->group : 0;
        job.padded = (w->width + LANES - 1) / LANES * LANES;
        /* int8：整行之和不超出 int32；int4：一组之和怎样都不超出。 */
        int64_t level = w->kind == INT8 ? INT32_MAX / (128 * w->width) : 32767;
        job.level = level < 32767 ? (int)level : 32767;
        int64_t sums = w->offset ? job.groups : 0;
        size_t bytes = (size_t)job.padded * sizeof(int16_t) + (size_t)(1 + sums) * sizeof(float);
        scratch = malloc((size_t)block * bytes);
        if (scratch == NULL) return 1;
        job.q_scale = (float *)scratch;
        job.q_sums = sums ? job.q_scale + block : NULL;
        job.q = (int16_t *)(job.q_scale + block * (1 + sums));
    }
    for (int64_t row = 0; row < rows; row += block) {
        job.x = x + row * w->width;
        job.y = y + row * w->outs;
        run(&job, rows - row < block ? rows - row : block, threads);
    }
    free(scratch);
    return 0;
}

const char *gpt2_instructions(void) {
#if defined(VECTORS) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return "AVX-512 VNNI";
#elif defined(VECTORS) && defined(__AVX512BW__)
    return "AVX-512";
#elif defined(VECTORS)
    return "AVX2";
#else
    return "generic C";
#endif
}

/* 编译目标里的指令，这个 CPU 是否真的有。 */
int gpt2_supported(void) {
#ifdef VECTORS
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

int gpt2_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
