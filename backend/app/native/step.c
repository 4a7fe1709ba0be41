/* 几个词元走一步，整步一次调用：各层、末尾的归一化、输出头。乘法之外的事都在读权重的空档里。
 *
 * 一行是一个词元；同一段文字接着的几个词元是几行，键数一个比一个多一。所以先把各行的键值都写进
 * 缓存，等齐，再看：后一个看得见前一个的。
 * 各线程只在几处等齐（每层：qkv、写键值、注意力、投影、c_fc、c_proj 之后）；归一化与取整各线程都做
 * 一遍，比等齐一次便宜。每一行的运算次序与别的行、与线程数无关：成批与单独算，逐位相同。
 * R 行数、C 宽度、H 查询头数、G 键值头数、D 头宽、S 一行的键数（含这一个词元）、V 词表、K 要 logits 的
 * 行数。
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
    const int64_t *keep;         /* (K,)：要 logits 的行，递增 */
    int64_t kept;
    const float *cosine, *sine; /* 各 (R, D/2)；不转就不看 */
    float *x;           /* (R, C)：残差流，进来时是嵌入 */
    float *heads;       /* (R, (H + 2G)·D) */
    float *mixed;       /* (R, H·D) */
    float *hidden;      /* (R, c_fc 的宽) */
    float *gated;       /* (R, c_proj 收的宽)：没有门就是 hidden */
    float *logits;      /* (K, V) */
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
static void product(int64_t rows, const Own *own, const Matrix *a, const float *x, float *y,
                    int64_t *begin, int64_t *end) {
    Job job;
    gpt2_bind(&job, a->weight, a->bias, rows, own->rounded);
    job.x = x;
    job.y = y;
    gpt2_share(a->weight->outs, own->thread, own->threads, begin, end);
    if (*begin == *end) return;
    gpt2_round(&job, 0, rows);
    gpt2_outputs(&job, rows, *begin, *end);
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

/* 一行的一个键值头与看它的几个查询头是一件活：写键值与看，两处分给同一个线程。 */
typedef struct {
    int64_t r, g, first, start; /* 第几行、哪个键值头、它的头一个查询头、它在缓存里的头一个数 */
    float *row;                 /* 这一行的 q、k、v */
} Unit;

static Unit unit(const Step *s, const Layer *l, int64_t u) {
    const Model *m = s->m;
    const int64_t r = u / m->kv_heads, g = u % m->kv_heads;
    return (Unit){.r = r, .g = g, .first = g * (m->heads / m->kv_heads),
                  .start = s->place[r] * l->row_stride + g * l->head_stride,
                  .row = s->heads + r * (m->heads + 2 * m->kv_heads) * m->head_dim};
}

static void my_units(const Step *s, const Own *own, int64_t *from, int64_t *to) {
    const int64_t units = s->rows * s->m->kv_heads;
    *from = units * own->thread / own->threads;
    *to = units * (own->thread + 1) / own->threads;
}

static void head(const Step *s, const Norm *norm, int64_t r, float *x) {
    const int64_t D = s->m->head_dim;
    if (norm->gain) gpt2_norm(norm, x, x, D);
    if (s->m->side) gpt2_turn(x, s->cosine + r * D / 2, s->sine + r * D / 2, s->m->side, D);
}

/* 归一化、旋转，键值写进缓存。 */
static void remember(const Step *s, const Own *own, const Layer *l) {
    const Model *m = s->m;
    const int64_t D = m->head_dim, group = m->heads / m->kv_heads;
    int64_t from, to;
    my_units(s, own, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const Unit u = unit(s, l, i);
        float *k = u.row + (m->heads + u.g) * D, *v = k + m->kv_heads * D;
        const int64_t slot = u.start + (s->keys[u.r] - 1) * D;
        for (int64_t h = u.first; h < u.first + group; h++) head(s, &l->query, u.r, u.row + h * D);
        head(s, &l->key, u.r, k);
        memcpy(l->keys + slot, k, (size_t)D * sizeof(float));
        memcpy(l->values + slot, v, (size_t)D * sizeof(float));
    }
}

static void attention(const Step *s, const Own *own, const Layer *l) {
    const Model *m = s->m;
    const int64_t D = m->head_dim, group = m->heads / m->kv_heads;
    int64_t from, to;
    my_units(s, own, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const Unit u = unit(s, l, i);
        for (int64_t h = u.first; h < u.first + group; h++)
            gpt2_attend(u.row + h * D, l->keys + u.start, l->values + u.start,
                        s->mixed + (u.r * m->heads + h) * D, own->scores, s->keys[u.r], D);
    }
}

/* c_fc 写出的自己那几列过激活；有门的要等齐，再各做一段列。 */
static void activate(Step *s, const Own *own, int64_t outs, int64_t begin, int64_t end) {
    const Model *m = s->m;
    const int64_t h = m->hidden;
    if (!m->gated) {
        for (int64_t r = 0; r < s->rows; r++)
            gpt2_activate(m->activation, s->hidden + r * outs + begin, end - begin);
        return;
    }
    gpt2_wait(&s->barrier);
    gpt2_share(h, own->thread, own->threads, &begin, &end);
    for (int64_t r = 0; r < s->rows; r++) {
        float *gate = s->hidden + r * outs, *y = s->gated + r * h;
        const float *up = gate + h;
        gpt2_activate(m->activation, gate + begin, end - begin);
        for (int64_t i = begin; i < end; i++) y[i] = gate[i] * up[i];
    }
}

static void layer(Step *s, const Own *own, const Layer *l) {
    const int64_t R = s->rows;
    int64_t begin, end;
    product(R, own, &l->qkv, inner(s, own, &l->attn_inner), s->heads, &begin, &end);
    gpt2_wait(&s->barrier);
    remember(s, own, l);
    gpt2_wait(&s->barrier);
    attention(s, own, l);
    gpt2_wait(&s->barrier);
    /* heads 此后没有人读：投影写在那里。 */
    product(R, own, &l->proj, s->mixed, s->heads, &begin, &end);
    add(s, s->heads, l->attn_alpha, begin, end);
    outer(s, own, &l->attn_outer);
    gpt2_wait(&s->barrier);
    product(R, own, &l->up, inner(s, own, &l->mlp_inner), s->hidden, &begin, &end);
    activate(s, own, l->up.weight->outs, begin, end);
    gpt2_wait(&s->barrier);
    product(R, own, &l->down, s->gated, s->mixed, &begin, &end);
    add(s, s->mixed, l->mlp_alpha, begin, end);
    outer(s, own, &l->mlp_outer);
    gpt2_wait(&s->barrier);
}

/* 要 logits 的几行，末尾归一化之后挨着放在自己的地方。 */
static const float *last(const Step *s, const Own *own) {
    const int64_t C = s->m->width;
    for (int64_t i = 0; i < s->kept; i++) {
        const float *row = s->x + s->keep[i] * C;
        if (s->m->final.gain)
            gpt2_norm(&s->m->final, row, own->normed + i * C, C);
        else
            memcpy(own->normed + i * C, row, (size_t)C * sizeof(float));
    }
    return own->normed;
}

static void work(Step *s, int thread, int threads) {
    const Model *m = s->m;
    char *at = s->own + s->own_bytes * (size_t)thread;
    Own own = {.normed = (float *)at, .thread = thread, .threads = threads};
    int64_t begin, end;
    own.scores = own.normed + s->rows * m->width;
    own.rounded = own.scores + s->most;
    for (int64_t i = 0; i < m->layers; i++) layer(s, &own, &m->layer[i]);
    if (s->kept) product(s->kept, &own, &m->head, last(s, &own), s->logits, &begin, &end);
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

/* 残差流 x (R, C) 会被改写；各行缓存的第 keys - 1 槽写入这个词元。cosine、sine 各 (R, D/2)，不转的模型
 * 给 NULL；keep (K,) 是要 logits 的行。0 = 成功，1 = 没有内存。 */
int gpt2_step(const Model *m, int64_t rows, const int64_t *keys, const int64_t *place,
              const float *cosine, const float *sine, float *x, int64_t kept, const int64_t *keep,
              float *logits, int threads) {
    const int64_t qkv = (m->heads + 2 * m->kv_heads) * m->head_dim;
    const int64_t up = m->gated ? 2 * m->hidden : m->hidden;
    const int64_t shared = qkv + m->width + up + (m->gated ? m->hidden : 0);
    Step s = {.m = m, .rows = rows, .keys = keys, .place = place, .cosine = cosine, .sine = sine,
              .x = x, .kept = kept, .keep = keep, .logits = logits};
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
    s.gated = m->gated ? s.hidden + rows * up : s.hidden;
    s.own = (char *)(s.heads + rows * shared);
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
