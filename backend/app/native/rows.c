/* 一行上的几件小事：归一化、激活、旋转、一个头的注意力；还有线程的等齐。
 *
 * 八个一组地算，组里的次序固定；写成编译器自己会向量化的循环，各指令集逐位相同。
 */
#include "step.h"

#include <math.h>
#include <string.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

/* 空转这么多次约十几微秒：比睡醒一次短，比两个线程的快慢之差长。 */
enum { SPINS = 4000 };

void gpt2_wait(Barrier *b) {
    if (b->threads == 1) return;
    const int round = __atomic_load_n(&b->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == b->threads) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_add_fetch(&b->round, 1, __ATOMIC_SEQ_CST);
#ifdef __linux__
        if (__atomic_load_n(&b->asleep, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &b->round, FUTEX_WAKE_PRIVATE, b->threads, NULL, NULL, 0);
#endif
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&b->round, __ATOMIC_ACQUIRE) != round) return;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
#ifdef __linux__
    __atomic_add_fetch(&b->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&b->round, __ATOMIC_SEQ_CST) == round)
        syscall(SYS_futex, &b->round, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
    __atomic_sub_fetch(&b->asleep, 1, __ATOMIC_SEQ_CST);
#else
    while (__atomic_load_n(&b->round, __ATOMIC_ACQUIRE) == round) sched_yield();
#endif
}

INLINE Eight at(const float *p) { return *(const Eight *)p; }

INLINE float total(Eight v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

void gpt2_norm(const Norm *norm, const float *x, float *y, int64_t n) {
    const int64_t main = n / 8 * 8;
    float mean = 0, squares = 0;
    if (norm->centered) {
        Eight sum = {0};
        for (int64_t i = 0; i < main; i += 8) sum += at(x + i);
        mean = total(sum);
        for (int64_t i = main; i < n; i++) mean += x[i];
        mean /= (float)n;
    }
    Eight sum = {0};
    for (int64_t i = 0; i < main; i += 8) sum += (at(x + i) - mean) * (at(x + i) - mean);
    squares = total(sum);
    for (int64_t i = main; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf(squares / (float)n + (float)norm->eps);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * norm->gain[i];
    if (norm->shift)
        for (int64_t i = 0; i < n; i++) y[i] += norm->shift[i];
}

/* 相对误差约 1e-7：2^n·e^r，|r| <= ln2 / 2，e^r 是六次多项式（Cephes 的系数）。 */
INLINE float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float magic = 12582912.0f, n = x * 1.44269504f + magic - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = ((uint32_t)(int32_t)n + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

void gpt2_activate(int64_t kind, float *x, int64_t n) {
    switch (kind) {
    case GELU_TANH: /* 0.5·x·(1 + tanh u) = x / (1 + e^(-2u))：没有相近的数相减 */
        for (int64_t i = 0; i < n; i++) {
            const float u = 0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
            x[i] = x[i] / (1.0f + exp_of(-2.0f * u));
        }
        break;
    case GELU:
        for (int64_t i = 0; i < n; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.7071067812f));
        break;
    case SILU:
        for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + exp_of(-x[i]));
        break;
    default: /* 不是数的仍不是数 */
        for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i];
        if (kind == RELU2)
            for (int64_t i = 0; i < n; i++) x[i] *= x[i];
    }
}

void gpt2_turn(float *x, const float *cosine, const float *sine, int64_t side, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        float *a = x + (side == 1 ? 2 * i : i), *b = a + side;
        const float was = *a;
        *a = was * cosine[i] - *b * sine[i];
        *b = *b * cosine[i] + was * sine[i];
    }
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    Eight one = {0}, two = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        one += at(a + i) * at(b + i);
        two += at(a + i + 8) * at(b + i + 8);
    }
    float sum = total(one + two);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y 的 16 列：各键的值按分数相加。 */
INLINE void weigh(const float *scores, const float *v, float *y, int64_t keys, int64_t D) {
    Eight one = {0}, two = {0};
    for (int64_t j = 0; j < keys; j++) {
        one += scores[j] * at(v + j * D);
        two += scores[j] * at(v + j * D + 8);
    }
    memcpy(y, &one, sizeof one);
    memcpy(y + 8, &two, sizeof two);
}

void gpt2_attend(const float *q, const float *k, const float *v, float *y, float *scores,
                 int64_t keys, int64_t D) {
    const float scale = 1.0f / sqrtf((float)D);
    float top = -INFINITY;
    for (int64_t j = 0; j < keys; j++) {
        scores[j] = dot(q, k + j * D, D) * scale;
        top = scores[j] > top ? scores[j] : top;
    }
    for (int64_t j = 0; j < keys; j++) scores[j] = exp_of(scores[j] - top);
    Eight sums = {0};
    int64_t j = 0, d = 0;
    for (; j + 8 <= keys; j += 8) sums += at(scores + j);
    float sum = total(sums);
    for (; j < keys; j++) sum += scores[j];
    for (; d + 16 <= D; d += 16) weigh(scores, v + d, y + d, keys, D);
    for (; d < D; d++) {
        y[d] = 0;
        for (int64_t j = 0; j < keys; j++) y[d] += scores[j] * v[j * D + d];
    }
    for (d = 0; d < D; d++) y[d] /= sum;
}
