/* 解码的一步，整步一次调用：各层、末尾的归一化、输出头。乘法之外的事都在读权重的空档里。
 *
 * 各线程只在五处等齐（每层：qkv、注意力、投影、c_fc、c_proj 之后）；归一化与取整各线程都做一遍，
 * 比等齐一次便宜。每一行的运算次序与别的行、与线程数无关：成批与单独算，逐位相同。
 * R 行数、C 宽度、H 查询头数、G 键值头数、D 头宽、S 一行的键数（含这一个词元）、V 词表。
 */
#include "step.h"

#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

typedef struct {
    const Model *m;
    int64_t rows, most;          /* R，各行里最大的 S */
    const int64_t *keys, *place; /* (R,)：各行的 S，与它在缓存的第几行 */
    float *x;           /* (R, C)：残差流，进来时是嵌入 */
    float *heads;       /* (R, (H + 2G)·D) */
    float *mixed;       /* (R, H·D) */
    float *hidden;      /* (R, c_fc 的宽) */
    float *logits;      /* (R, V) */
    char *own;          /* 各线程自己的：归一化之后的行、分数、取整的 x */
    size_t own_bytes;
    Barrier barrier;
} Step;

typedef struct {
    float *normed, *scores;
    void *rounded;
    int thread, threads;
} Own;

/* y 的这一段列；begin、end 是自己的那一段，给后面接着做的。 */
static void product(const Step *s, const Own *own, const Matrix *a, const float *x, float *y,
                    int64_t *begin, int64_t *end) {
    Job job;
    gpt2_bind(&job, a->weight, a->bias, s->rows, own->rounded);
    job.x = x;
    job.y = y;
    gpt2_share(a->weight->outs, own->thread, own->threads, begin, end);
    if (*begin == *end) return;
    gpt2_round(&job, 0, s->rows);
    gpt2_outputs(&job, s->rows, *begin, *end);
}

/* x <- α·x + branch 的自己那几列。branch 借 mixed 放：先写完再加。 */
static void add(const Step *s, const float *branch, float alpha, int64_t begin, int64_t end) {
    const int64_t C = s->m->width;
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t i = begin; i < end; i++)
            s->x[r * C + i] = alpha * s->x[r * C + i] + branch[r * C + i];
}

/* 内侧的归一化，没有就是 x 本身；每个线程都算全部的行，写在自己的地方。 */
static const float *inner(const Step *s, const Own *own, const Norm *norm) {
    if (norm->gain == NULL) return s->x;
    for (int64_t r = 0; r < s->rows; r++)
        gpt2_norm(norm, s->x + r * s->m->width, own->normed + r * s->m->width, s->m->width);
    return own->normed;
}

/* 外侧的归一化，就地：行分给各线程，之后还要等齐一次。 */
static void outer(Step *s, const Own *own, const Norm *norm) {
    if (norm->gain == NULL) return;
    gpt2_wait(&s->barrier);
    for (int64_t r = own->thread; r < s->rows; r += own->threads) {
        float *row = s->x + r * s->m->width;
        gpt2_norm(norm, row, row, s->m->width);
    }
}

static void attention(const Step *s, const Own *own, const Layer *layer) {
    const Model *m = s->m;
    const int64_t units = s->rows * m->kv_heads, group = m->heads / m->kv_heads;
    const int64_t D = m->head_dim;
    const int64_t from = units * own->thread / own->threads;
    const int64_t to = units * (own->thread + 1) / own->threads;
    for (int64_t u = from; u < to; u++) {
        const int64_t r = u / m->kv_heads, g = u % m->kv_heads, last = s->keys[r] - 1;
        float *row = s->heads + r * (m->heads + 2 * m->kv_heads) * D;
        float *k = layer->keys + s->place[r] * layer->row_stride + g * layer->head_stride;
        float *v = layer->values + s->place[r] * layer->row_stride + g * layer->head_stride;
        memcpy(k + last * D, row + (m->heads + g) * D, (size_t)D * sizeof(float));
        memcpy(v + last * D, row + (m->heads + m->kv_heads + g) * D, (size_t)D * sizeof(float));
        for (int64_t h = g * group; h < (g + 1) * group; h++)
            gpt2_attend(row + h * D, k, v, s->mixed + (r * m->heads + h) * D, own->scores,
                        s->keys[r], D);
    }
}

static void layer(Step *s, const Own *own, const Layer *l) {
    const Model *m = s->m;
    const int64_t hidden = l->up.weight->outs;
    int64_t begin, end;
    product(s, own, &l->qkv, inner(s, own, &l->attn_inner), s->heads, &begin, &end);
    gpt2_wait(&s->barrier);
    attention(s, own, l);
    gpt2_wait(&s->barrier);
    /* heads 此后没有人读：投影写在那里。 */
    product(s, own, &l->proj, s->mixed, s->heads, &begin, &end);
    add(s, s->heads, l->attn_alpha, begin, end);
    outer(s, own, &l->attn_outer);
    gpt2_wait(&s->barrier);
    product(s, own, &l->up, inner(s, own, &l->mlp_inner), s->hidden, &begin, &end);
    for (int64_t r = 0; r < s->rows; r++)
        gpt2_activate(m->activation, s->hidden + r * hidden + begin, end - begin);
    gpt2_wait(&s->barrier);
    product(s, own, &l->down, s->hidden, s->mixed, &begin, &end);
    add(s, s->mixed, l->mlp_alpha, begin, end);
    outer(s, own, &l->mlp_outer);
    gpt2_wait(&s->barrier);
}

static void work(Step *s, int thread, int threads) {
    const Model *m = s->m;
    char *at = s->own + s->own_bytes * (size_t)thread;
    Own own = {.normed = (float *)at, .thread = thread, .threads = threads};
    int64_t begin, end;
    own.scores = own.normed + s->rows * m->width;
    own.rounded = own.scores + s->most;
    for (int64_t i = 0; i < m->layers; i++) layer(s, &own, &m->layer[i]);
    product(s, &own, &m->head, inner(s, &own, &m->final), s->logits, &begin, &end);
}

static size_t most_rounded(const Model *m, int64_t rows) {
    size_t most = gpt2_round_bytes(m->head.weight, rows);
    for (int64_t i = 0; i < m->layers; i++) {
        const Layer *l = &m->layer[i];
        const Weight *each[] = {l->qkv.weight, l->proj.weight, l->up.weight, l->down.weight};
        for (int k = 0; k < 4; k++) {
            const size_t bytes = gpt2_round_bytes(each[k], rows);
            most = bytes > most ? bytes : most;
        }
    }
    return most;
}

/* 残差流 x (R, C) 会被改写；各行缓存的第 keys - 1 槽写入这个词元。0 = 成功，1 = 没有内存。 */
int gpt2_step(const Model *m, int64_t rows, const int64_t *keys, const int64_t *place, float *x,
              float *logits, int threads) {
    const int64_t qkv = (m->heads + 2 * m->kv_heads) * m->head_dim;
    const int64_t shared = qkv + m->width + m->hidden;
    Step s = {.m = m, .rows = rows, .keys = keys, .place = place, .x = x, .logits = logits};
    for (int64_t r = 0; r < rows; r++) s.most = keys[r] > s.most ? keys[r] : s.most;
#ifndef _OPENMP
    threads = 1;
#endif
    s.own_bytes = (size_t)(rows * m->width + s.most) * sizeof(float) + most_rounded(m, rows);
    s.own_bytes = (s.own_bytes + 63) / 64 * 64;
    s.heads = malloc((size_t)(rows * shared) * sizeof(float) + s.own_bytes * (size_t)threads);
    if (s.heads == NULL) return 1;
    s.mixed = s.heads + rows * qkv;
    s.hidden = s.mixed + rows * m->width;
    s.own = (char *)(s.hidden + rows * m->hidden);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            s.barrier.threads = omp_get_num_threads();
            work(&s, omp_get_thread_num(), omp_get_num_threads());
        }
    } else
#endif
    {
        s.barrier.threads = 1;
        work(&s, 0, 1);
    }
    free(s.heads);
    return 0;
}
