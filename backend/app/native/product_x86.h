/* product.c 的 AVX2 与 AVX-512：几个原语（宽度由编译目标定）与各种块。
 *
 * 一块是 R 行乘 O 个输出；row、out 是它们的下标，末尾的块里会重复。
 */
enum { LINE = 64, AHEAD = 8192 };

#ifdef __AVX512BW__
enum { ROWS_F = 3, OUTS_F = 8, ROWS_8 = 3, OUTS_8 = 8, ROWS_4 = 3, OUTS_4 = 4, OUTS_1 = 4 };
enum { LANES = 32, FLANES = 16 };
typedef __m512i Ints;
typedef __m512 Floats;
INLINE Ints zeros(void) { return _mm512_setzero_si512(); }
INLINE Ints load_codes(const int8_t *p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
INLINE Ints load_q(const int16_t *p) { return _mm512_loadu_si512(p); }
INLINE Ints dot(Ints acc, Ints a, Ints b) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
INLINE int32_t total(Ints v) { return _mm512_reduce_add_epi32(v); }
INLINE Floats fzeros(void) { return _mm512_setzero_ps(); }
INLINE Floats load_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE Floats load_x(const float *p) { return _mm512_loadu_ps(p); }
INLINE Floats fma_of(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float ftotal(Floats v) { return _mm512_reduce_add_ps(v); }
#else
/* 累加的寄存器、权重、x 恰好 16 个：浮点 4 行 3 个输出，整数 4 行 2 个。 */
enum { ROWS_F = 4, OUTS_F = 3, ROWS_8 = 4, OUTS_8 = 2, ROWS_4 = 3, OUTS_4 = 4, OUTS_1 = 4 };
enum { LANES = 16, FLANES = 8 };
typedef __m256i Ints;
typedef __m256 Floats;
INLINE Ints zeros(void) { return _mm256_setzero_si256(); }
INLINE Ints load_codes(const int8_t *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
}
INLINE Ints load_q(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE Ints dot(Ints acc, Ints a, Ints b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
INLINE int32_t total(Ints v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
INLINE Floats fzeros(void) { return _mm256_setzero_ps(); }
INLINE Floats load_half(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE Floats load_x(const float *p) { return _mm256_loadu_ps(p); }
INLINE Floats fma_of(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#endif
INLINE float ftotal8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#ifndef __AVX512BW__
INLINE float ftotal(Floats v) { return ftotal8(v); }
#endif

/* 一块是内存里相连的 O 行：每步用掉 bytes 字节，就预取前方同样多的，一行也不会多要。
 * 行太短，硬件的预取来不及认出它。 */
INLINE void prefetch(const void *at, int64_t bytes) {
    UNROLL for (int64_t k = 0; k < bytes; k += LINE)
        _mm_prefetch((const char *)at + AHEAD + k, _MM_HINT_T0);
}

/* 留在寄存器里：编译器会改成每一行都从内存再读一遍，读的端口就不够用了。 */
#define KEEP(v) __asm__("" : "+x"(v))

#define FLOAT_TILE(name, type, load)                                                           \
    TILE(name) {                                                                               \
        const int64_t width = j->w->width, main = width - width % FLANES;                      \
        const type *codes = (const type *)j->w->codes, *c[8];                                  \
        const float *x[4];                                                                     \
        type rest[8][FLANES];                                                                  \
        float tail[4][FLANES];                                                                 \
        Floats acc[4][8];                                                                      \
        UNROLL for (int r = 0; r < R; r++) {                                                   \
            x[r] = j->x + row[r] * width;                                                      \
            UNROLL for (int o = 0; o < O; o++) acc[r][o] = fzeros();                           \
        }                                                                                      \
        UNROLL for (int o = 0; o < O; o++) c[o] = codes + out[o] * width;                      \
        /* 第二段是不足一个向量的末尾，从补零的副本里读。 */                                   \
        for (int part = main == 0; part < 1 + (main < width); part++) {                        \
            if (part) {                                                                        \
                UNROLL for (int o = 0; o < O; o++) {                                           \
                    memset(rest[o], 0, sizeof rest[o]);                                        \
                    memcpy(rest[o], c[o] + main, (size_t)(width - main) * sizeof(type));       \
                    c[o] = rest[o] - main;                                                     \
                }                                                                              \
                UNROLL for (int r = 0; r < R; r++) {                                           \
                    memset(tail[r], 0, sizeof tail[r]);                                        \
                    memcpy(tail[r], x[r] + main, (size_t)(width - main) * sizeof(float));      \
                    x[r] = tail[r] - main;                                                     \
                }                                                                              \
            }                                                                                  \
            for (int64_t i = part ? main : 0; i < main + part * FLANES; i += FLANES) {         \
                Floats b[8];                                                                   \
                prefetch(codes + out[0] * width + i * O, FLANES * O * (int)sizeof(type));      \
                UNROLL for (int o = 0; o < O; o++) b[o] = load(c[o] + i);                      \
                UNROLL for (int o = 0; o < O; o++) KEEP(b[o]);                                 \
                UNROLL for (int r = 0; r < R; r++) {                                           \
                    Floats a = load_x(x[r] + i);                                               \
                    UNROLL for (int o = 0; o < O; o++) acc[r][o] = fma_of(a, b[o], acc[r][o]); \
                }                                                                              \
            }                                                                                  \
        }                                                                                      \
        UNROLL for (int r = 0; r < R; r++)                                                     \
            UNROLL for (int o = 0; o < O; o++) put(j, row[r], out[o], ftotal(acc[r][o]));      \
    }
FLOAT_TILE(tile_float, float, load_x)
FLOAT_TILE(tile_fp16, uint16_t, load_half)

TILE(tile_int8) {
    const int64_t width = j->w->width, main = width - width % LANES;
    const int8_t *codes = (const int8_t *)j->w->codes, *c[8];
    const int16_t *q[4];
    int8_t rest[8][LANES];
    Ints acc[4][8];
    UNROLL for (int r = 0; r < R; r++) {
        q[r] = j->q + row[r] * j->padded;
        UNROLL for (int o = 0; o < O; o++) acc[r][o] = zeros();
    }
    UNROLL for (int o = 0; o < O; o++) c[o] = codes + out[o] * width;
    for (int part = main == 0; part < 1 + (main < width); part++) {
        if (part)
            UNROLL for (int o = 0; o < O; o++) {
                memset(rest[o], 0, sizeof rest[o]);
                memcpy(rest[o], c[o] + main, (size_t)(width - main));
                c[o] = rest[o] - main;
            }
        for (int64_t i = part ? main : 0; i < main + part * LANES; i += LANES) {
            Ints b[8];
            prefetch(codes + out[0] * width + i * O, LANES * O);
            UNROLL for (int o = 0; o < O; o++) b[o] = load_codes(c[o] + i);
            UNROLL for (int o = 0; o < O; o++) KEEP(b[o]);
            UNROLL for (int r = 0; r < R; r++) {
                Ints a = load_q(q[r] + i);
                KEEP(a);
                UNROLL for (int o = 0; o < O; o++) acc[r][o] = dot(acc[r][o], a, b[o]);
            }
        }
    }
    const float *scale = (const float *)j->w->scale;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int o = 0; o < O; o++)
            put(j, row[r], out[o],
                (float)total(acc[r][o]) * (j->q_scale[row[r]] * scale[out[o]]));
}

/* 一组的尺度只管 32 列起，所以 int4 总用 256 位；32 列里偶数列在前、奇数列在后，与 q 的次序相同。 */
INLINE __m256i dot4(__m256i acc, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(acc, a, b);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}

INLINE void nibbles(const void *codes, int64_t i, __m256i *even, __m256i *odd) {
    const __m128i *at = (const __m128i *)((const uint8_t *)codes + i / 2);
    const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128(at)), eight = _mm256_set1_epi16(8);
    *even = _mm256_sub_epi16(_mm256_and_si256(both, _mm256_set1_epi16(15)), eight);
    *odd = _mm256_sub_epi16(_mm256_srli_epi16(both, 4), eight);
}

INLINE float dot_groups(const float *a, const float *b, int64_t n) {
    __m256 acc = _mm256_setzero_ps();
    float rest = 0;
    int64_t g = 0;
    for (; g + 8 <= n; g += 8)
        acc = _mm256_fmadd_ps(_mm256_loadu_ps(a + g), _mm256_loadu_ps(b + g), acc);
    for (; g < n; g++) rest += a[g] * b[g];
    return ftotal8(acc) + rest;
}

INLINE void widen_scales(float *to, const uint16_t *half, int64_t n) {
    int64_t g = 0;
    for (; g + 8 <= n; g += 8)
        _mm256_storeu_ps(to + g, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + g))));
    for (; g < n; g++) to[g] = half_to_float(half[g]);
}

TILE(tile_int4) {
    const Weight *w = j->w;
    const int64_t width = w->width, groups = j->groups, group = w->group;
    float scale[4][MAX_GROUPS];
    __m256 acc[4][8];
    UNROLL for (int o = 0; o < O; o++) {
        widen_scales(scale[o], (const uint16_t *)w->scale + out[o] * groups, groups);
        UNROLL for (int r = 0; r < R; r++) acc[r][o] = _mm256_setzero_ps();
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = g * group; i < (g + 1) * group; i += 32) {
            prefetch((const char *)w->codes + (out[0] * width + i * O) / 2, 16 * O);
            UNROLL for (int o = 0; o < O; o++) {
                __m256i even, odd;
                nibbles(w->codes, out[o] * width + i, &even, &odd);
                __m256 s = _mm256_set1_ps(scale[o][g]);
                UNROLL for (int r = 0; r < R; r++) {
                    const __m256i *a = (const __m256i *)(j->q + row[r] * j->padded + i);
                    __m256i sum = _mm256_madd_epi16(_mm256_loadu_si256(a), even);
                    sum = dot4(sum, _mm256_loadu_si256(a + 1), odd);
                    acc[r][o] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), s, acc[r][o]);
                }
            }
        }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int o = 0; o < O; o++) {
            float value = ftotal8(acc[r][o]);
            if (w->offset)
                value += dot_groups(w->offset + out[o] * groups,
                                    j->q_sums + row[r] * groups, groups);
            put(j, row[r], out[o], value * j->q_scale[row[r]]);
        }
}
