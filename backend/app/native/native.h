/* 各文件共用：权重的四种格式，一次乘法要的东西。
 *
 * R 行数、I 输入宽、O 输出数、G = I / group。
 */
#ifndef GPT2_NATIVE_H
#define GPT2_NATIVE_H
#include <stddef.h>
#include <stdint.h>

enum { FLOAT32 = 0, FP16 = 1, INT8 = 2, INT4 = 3 };

typedef struct {
    int64_t kind, outs, width, group;
    const void *codes;   /* (O, I) float、半精度或 int8；INT4 (O, I/2)，低四位是偶数列 */
    const void *scale;   /* INT8 (O,) float；INT4 (O, G) 半精度 */
    const float *offset; /* INT4 (O, G) 加在每个 (码 - 8)·scale 上；NULL = 没有 */
} Weight;

typedef struct {
    const Weight *w;
    const float *bias; /* (O,)；NULL = 没有 */
    const float *x;    /* (R, I) */
    float *y;          /* (R, stride) */
    int16_t *q;        /* (R, padded)：取整后的 x，末尾补零 */
    float *q_scale;    /* (R,) */
    float *q_sums;     /* (R, G)：各组 q 之和，只有 offset 要 */
    int64_t stride, padded, groups;
    int level;         /* q 的最大绝对值 */
} Job;

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 这个权重乘 rows 行，x 取整要多少字节；bind 把它们分给 job。 */
size_t gpt2_round_bytes(const Weight *w, int64_t rows);
void gpt2_bind(Job *job, const Weight *w, const float *bias, int64_t rows, void *scratch);
/* 第 from..to-1 行取整；浮点的权重什么也不做。 */
void gpt2_round(Job *job, int64_t from, int64_t to);
/* y 的第 begin..end-1 列。 */
void gpt2_outputs(const Job *job, int64_t rows, int64_t begin, int64_t end);
/* n 个输出分给 threads 个线程，这是第 thread 段；边界取 24 的倍数，零头只在最后。 */
void gpt2_share(int64_t n, int thread, int threads, int64_t *begin, int64_t *end);

#endif
