/* product.c 的块，给没有 AVX2 的 CPU：同样的和，写成编译器自己会向量化的循环。 */
enum { ROWS_F = 3, OUTS_F = 4, ROWS_8 = 3, OUTS_8 = 4, ROWS_4 = 3, OUTS_4 = 4, OUTS_1 = 4, LANES = 16 };

#define SAME(v) (v)

#define FLOAT_TILE(name, type, value)                                                          \
    TILE(name) {                                                                               \
        const int64_t width = j->w->width;                                                     \
        for (int o = 0; o < O; o++)                                                            \
            for (int r = 0; r < R; r++) {                                                      \
                const type *c = (const type *)j->w->codes + out[o] * width;                    \
                const float *x = j->x + row[r] * width;                                        \
                float sum[8] = {0};                                                            \
                int64_t i = 0;                                                                 \
                for (; i + 8 <= width; i += 8)                                                 \
                    for (int k = 0; k < 8; k++) sum[k] += value(c[i + k]) * x[i + k];          \
                for (; i < width; i++) sum[i & 7] += value(c[i]) * x[i];                       \
                put(j, row[r], out[o],                                                         \
                    ((sum[0] + sum[4]) + (sum[2] + sum[6]))                                    \
                        + ((sum[1] + sum[5]) + (sum[3] + sum[7])));                            \
            }                                                                                  \
    }
FLOAT_TILE(tile_float, float, SAME)
FLOAT_TILE(tile_fp16, uint16_t, half_to_float)

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
