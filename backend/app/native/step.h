/* 整步要的模型，与每一行上的几件小事。字母见 step.c。 */
#ifndef GPT2_STEP_H
#define GPT2_STEP_H
#include "native.h"

typedef struct {
    const float *gain, *shift; /* gain NULL = 没有这个归一化；shift NULL = 没有偏置 */
    double eps;
    int64_t centered; /* LayerNorm 减均值，RMSNorm 不减 */
} Norm;

typedef struct {
    const Weight *weight;
    const float *bias;
} Matrix;

typedef struct {
    Norm attn_inner, attn_outer, mlp_inner, mlp_outer;
    Norm query, key; /* 各头上的，gain NULL = 没有 */
    Matrix qkv, proj, up, down;
    double attn_alpha, mlp_alpha;
    float *keys, *values; /* (R, G, 槽数, D)：行、头之间的距离见下，槽之间是 D */
    int64_t row_stride, head_stride;
} Layer;

typedef struct {
    int64_t layers, width, heads, kv_heads, head_dim, hidden, activation;
    int64_t gated; /* c_fc 的前一半过激活，乘后一半 */
    int64_t side;  /* 转的一对里两维的号差几：半个头宽，或 1；0 = 不转 */
    Norm final;
    Matrix head;
    Layer *layer;
} Model;

enum { GELU_TANH = 0, GELU = 1, RELU = 2, RELU2 = 3, SILU = 4 };

/* 等齐：先空转一小会儿，再睡。一直空转的话，别的进程一忙，两个线程就轮流白等。 */
typedef struct {
    int threads, arrived, round, asleep;
} Barrier;

void gpt2_wait(Barrier *barrier);
void gpt2_norm(const Norm *norm, const float *x, float *y, int64_t n);
void gpt2_activate(int64_t kind, float *x, int64_t n);
/* 一个头 x (D,) 转过一个角：cos、sin 各 (D/2,)。 */
void gpt2_turn(float *x, const float *cosine, const float *sine, int64_t side, int64_t D);
/* 一个查询头：q (D,)、k/v (S, D) -> y (D,)；scores 是 S 个数的地方。 */
void gpt2_attend(const float *q, const float *k, const float *v, float *y, float *scores,
                 int64_t keys, int64_t D);

#endif
