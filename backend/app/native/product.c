/* 权重的乘法 y = x·Wᵀ + b：权重按 (O, I) 原样读一遍，不另存一份。
 *
 * 一行就是一行：每个 (行, 输出) 的运算次序固定，与同批的行、线程数、怎样分块无关。
 * 整数格式把 x 的每一行按自己的尺度取整成 int16，乘积在 int32 里精确相加，所以 int8 的结果
 * 在各指令集上逐位相同；取 int16 而不取 int8，是因为 AVX2 的 maddubs 会在 16 位里饱和，
 * 而 madd(int16) 不会，也更准。浮点不许编译器自行并成乘加（-ffp-contract=off）。
 */
#include "native.h"

#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(GPT2_GENERIC)
#define VECTORS 1
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* 一段 CHUNK_BYTES 的权重留在二级缓存里供各行用；输出按 STEP 分给线程，是各块的公倍数。 */
enum { MAX_GROUPS = 1024, BLOCK_ROWS = 192, CHUNK_BYTES = 1 << 17, STEP = 24 };
static const int BITS[] = {[FLOAT32] = 32, [FP16] = 16, [INT8] = 8, [INT4] = 4};

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

INLINE void put(const Job *j, int64_t row, int64_t out, float value) {
    j->y[row * j->stride + out] = j->bias ? value + j->bias[out] : value;
}

#ifdef VECTORS
#include "product_x86.h"
#else
#include "product_generic.h"
#endif

/* 一行 x 取整：尺度是这一行自己的。有 NaN 或无穷的一行，结果整行是 NaN，不是悄悄的数。 */
static void round_row(Job *j, int64_t row) {
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

void gpt2_round(Job *j, int64_t from, int64_t to) {
    if (j->w->kind == INT8 || j->w->kind == INT4)
        for (int64_t r = from; r < to; r++) round_row(j, r);
}

/* 几行一块或一行一块。不满一块时最后的行与输出重复算几遍：写的是同样的数。 */
#define SWEEP(name, tile, ROWS, OUTS)                                                          \
    static void name(const Job *j, int64_t rows, int64_t begin, int64_t end, int64_t chunk) {  \
        for (int64_t from = begin; from < end; from += chunk) {                                \
            const int64_t to = least(from + chunk, end);                                       \
            for (int64_t r = 0; r < rows; r += ROWS) {                                         \
                const int one = r + 1 == rows, outs = one ? OUTS_1 : OUTS;                     \
                int64_t row[ROWS], out[8];                                                     \
                for (int k = 0; k < ROWS; k++) row[k] = least(r + k, rows - 1);                \
                for (int64_t at = from; at < to; at += outs) {                                 \
                    for (int k = 0; k < outs; k++) out[k] = least(at + k, to - 1);             \
                    if (one) tile(j, row, out, 1, OUTS_1);                                     \
                    else tile(j, row, out, ROWS, OUTS);                                        \
                }                                                                              \
            }                                                                                  \
        }                                                                                      \
    }
SWEEP(sweep_float, tile_float, ROWS_F, OUTS_F)
SWEEP(sweep_fp16, tile_fp16, ROWS_F, OUTS_F)
SWEEP(sweep_int8, tile_int8, ROWS_8, OUTS_8)
SWEEP(sweep_int4, tile_int4, ROWS_4, OUTS_4)

void gpt2_outputs(const Job *j, int64_t rows, int64_t begin, int64_t end) {
    const Weight *w = j->w;
    int64_t chunk = CHUNK_BYTES * 8 / (w->width * BITS[w->kind]) / STEP * STEP;
    if (chunk < STEP) chunk = STEP;
    switch (w->kind) {
    case FLOAT32: sweep_float(j, rows, begin, end, chunk); break;
    case FP16: sweep_fp16(j, rows, begin, end, chunk); break;
    case INT8: sweep_int8(j, rows, begin, end, chunk); break;
    default: sweep_int4(j, rows, begin, end, chunk);
    }
}

void gpt2_share(int64_t n, int thread, int threads, int64_t *begin, int64_t *end) {
    const int64_t steps = (n + STEP - 1) / STEP;
    *begin = least(steps * thread / threads * STEP, n);
    *end = least(steps * (thread + 1) / threads * STEP, n);
}

static int64_t padded(const Weight *w) { return (w->width + LANES - 1) / LANES * LANES; }

size_t gpt2_round_bytes(const Weight *w, int64_t rows) {
    if (w->kind != INT8 && w->kind != INT4) return 0;
    const int64_t sums = w->offset ? w->width / w->group : 0;
    const size_t row = (size_t)padded(w) * sizeof(int16_t) + (size_t)(1 + sums) * sizeof(float);
    return (size_t)rows * row;
}

void gpt2_bind(Job *job, const Weight *w, const float *bias, int64_t rows, void *scratch) {
    *job = (Job){.w = w, .bias = bias, .stride = w->outs};
    if (w->kind != INT8 && w->kind != INT4) return;
    job->groups = w->kind == INT4 ? w->width / w->group : 0;
    job->padded = padded(w);
    /* int8：整行之和不超出 int32；int4：一组之和怎样都不超出。 */
    const int64_t level = w->kind == INT8 ? INT32_MAX / (128 * w->width) : 32767;
    job->level = (int)least(level, 32767);
    const int64_t sums = w->offset ? job->groups : 0;
    job->q_scale = scratch;
    job->q_sums = sums ? job->q_scale + rows : NULL;
    job->q = (int16_t *)(job->q_scale + rows * (1 + sums));
}

static void work(const Job *j, int64_t rows, int thread, int threads) {
    int64_t begin, end;
    gpt2_share(j->w->outs, thread, threads, &begin, &end);
    gpt2_outputs(j, rows, begin, end);
}

static void run(Job *j, int64_t rows, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            if (j->q) {
#pragma omp for schedule(static)
                for (int64_t r = 0; r < rows; r++) round_row(j, r);
            }
            work(j, rows, omp_get_thread_num(), omp_get_num_threads());
        }
        return;
    }
#endif
    (void)threads;
    gpt2_round(j, 0, rows);
    work(j, rows, 0, 1);
}

/* y (R, O) = x (R, I)·Wᵀ + bias。0 = 成功，1 = 没有内存。 */
int gpt2_product(const Weight *w, const float *x, int64_t rows, const float *bias, float *y,
                 int threads) {
    const int64_t block = least(rows, BLOCK_ROWS);
    char *scratch = malloc(gpt2_round_bytes(w, block) + 1);
    Job job;
    if (scratch == NULL) return 1;
    gpt2_bind(&job, w, bias, block, scratch);
    for (int64_t row = 0; row < rows; row += block) {
        job.x = x + row * w->width;
        job.y = y + row * w->outs;
        run(&job, least(rows - row, block), threads);
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
