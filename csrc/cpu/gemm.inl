// Packing and the register tile of the matrix products. Included inside one namespace per chip (see avx2.cpp), after
// SDPO_LANES (floats in a vector register) and SDPO_TILE_VECTORS (registers across a tile) are defined.

typedef float Vector __attribute__((vector_size(4 * SDPO_LANES)));
constexpr int TILE_VECTORS = SDPO_TILE_VECTORS;
constexpr int TILE_COLUMNS = TILE_VECTORS * SDPO_LANES;

SDPO_HD Vector load_vector(const void* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

// --- operand types ---

struct F32 {
  using Element = float;
  static constexpr bool bf16 = false;
  static constexpr int PER_UNIT = 1;
  SDPO_HD Vector step(Vector sum, Unit a, Vector b) { return sum + float_of_bits(a) * b; }
  SDPO_HD Element element(float value) { return value; }
  SDPO_HD float value(Element element) { return element; }
};

#if SDPO_BF16_DOT
struct Bf16 {
  using Element = uint16_t;
  static constexpr bool bf16 = true;
  static constexpr int PER_UNIT = 2;
  SDPO_HD Vector step(Vector sum, Unit a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  SDPO_HD Element element(float value) { return bf16_of_float(value); }
  SDPO_HD float value(Element element) { return float_of_bf16(element); }
};
#endif

template <class Type>
SDPO_HD int64_t units_of(int64_t count) {
  return (count + Type::PER_UNIT - 1) / Type::PER_UNIT;
}

// --- packed operands ---

// 64 columns, packed by the columns of a register tile: what a tile reads lies in one piece, and fits the first-level
// cache. In rows of 64 a narrower tile would read a part of each, and all parts fall into a few of the cache's sets.
SDPO_HD int64_t in_panel(int64_t units, int64_t unit, int64_t column) {
  return (column / TILE_COLUMNS * units + unit) * TILE_COLUMNS + column % TILE_COLUMNS;
}

// 64 columns as the rows of a product, likewise packed by the rows of a tile where a tile is narrow.
constexpr int64_t LEFT_STRIDE = TILE_COLUMNS < PANEL ? TILE_ROWS : PANEL;
constexpr int64_t LEFT_COLUMNS = (PANEL + LEFT_STRIDE - 1) / LEFT_STRIDE * LEFT_STRIDE;
SDPO_HD int64_t in_left(int64_t units, int64_t unit, int64_t column) {
  return (column / LEFT_STRIDE * units + unit) * LEFT_STRIDE + column % LEFT_STRIDE;
}

struct Panel {
  const Unit* data;
  int64_t units;     // of the whole panel
  int64_t from = 0;  // the first that is read
};

// --- the register tile: rows × 64 columns, over any number of units ---

// The left operand: unit u of step s of row r is row[r][s·step + u·STRIDE]. Row r's 64 results go to c[r].
template <class Type, int ROWS, int STRIDE>
SDPO_HD void tile(const Unit* const* row, int64_t steps, int64_t step, int64_t units, const Panel& panel,
                  float* const* c, bool add) {
  for (int first = 0; first < PANEL; first += TILE_COLUMNS) {
    Vector sum[ROWS][TILE_VECTORS] = {};
    const Unit* b = panel.data + in_panel(panel.units, panel.from, first);
    for (int64_t s = 0; s < steps; s++) {
      const Unit* a[ROWS];
      for (int r = 0; r < ROWS; r++) {
        a[r] = row[r] + s * step;
        // the next step of these rows is too far away for the hardware prefetcher
        if (s + 1 < steps)
          for (int64_t u = 0; u < units * STRIDE; u += 16) __builtin_prefetch(a[r] + step + u);
      }

      for (int64_t u = 0; u < units; u++, b += TILE_COLUMNS) {
        Vector right[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) right[v] = load_vector(b + v * SDPO_LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          Unit left = a[r][u * STRIDE];
#pragma GCC unroll 8
          for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = Type::step(sum[r][v], left, right[v]);
        }
      }
    }

    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < TILE_VECTORS; v++) {
        float* to = c[r] + first + v * SDPO_LANES;
        Vector total = add ? load_vector(to) + sum[r][v] : sum[r][v];  // sums of parts: less rounding than one long sum
        memcpy(to, &total, sizeof total);
      }
  }
}

template <class Type, int STRIDE>
__attribute__((noinline)) void any_tile(int64_t rows, const Unit* const* row, int64_t steps, int64_t step,
                                        int64_t units, const Panel& panel, float* const* c, bool add) {
  switch (rows) {
    case 6:
      return tile<Type, 6, STRIDE>(row, steps, step, units, panel, c, add);
    case 5:
      return tile<Type, 5, STRIDE>(row, steps, step, units, panel, c, add);
    case 4:
      return tile<Type, 4, STRIDE>(row, steps, step, units, panel, c, add);
    case 3:
      return tile<Type, 3, STRIDE>(row, steps, step, units, panel, c, add);
    case 2:
      return tile<Type, 2, STRIDE>(row, steps, step, units, panel, c, add);
    default:
      return tile<Type, 1, STRIDE>(row, steps, step, units, panel, c, add);
  }
}

// --- packing ---

// A unit of consecutive numbers of a row; numbers past its end are 0.
SDPO_HD Unit row_unit(F32, const Matrix& m, int64_t row, int64_t unit) { return bits_of_float(m.number(row, unit)); }

SDPO_HD Unit pair(uint16_t low, uint16_t high) { return Unit(low) | Unit(high) << 16; }

#if SDPO_BF16_DOT
SDPO_HD uint16_t bf16_number(const Matrix& m, int64_t row, int64_t column) {
  int64_t at = row * m.stride + column;
  return m.bf16 ? ((const uint16_t*)m.data)[at] : bf16_of_float(((const float*)m.data)[at]);
}

SDPO_HD Unit row_unit(Bf16, const Matrix& m, int64_t row, int64_t unit) {
  uint16_t high = 2 * unit + 1 < m.columns ? bf16_number(m, row, 2 * unit + 1) : uint16_t(0);
  return pair(bf16_number(m, row, 2 * unit), high);
}
#endif

template <class Type>
void load_rows(const Matrix& from, int64_t begin, int64_t end, Unit* to) {
  int64_t units = units_of<Type>(from.columns);
  for (int64_t row = begin; row < end; row++)
    for (int64_t u = 0; u < units; u++) to[row * units + u] = row_unit(Type{}, from, row, u);
}

#if SDPO_LANES == 16
// Transposes 16 rows of 16 units, `stride_bytes` apart, into rows 64 units apart.
SDPO_HD void transpose_16(const char* from, int64_t stride_bytes, Unit* to) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * stride_bytes);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4g + j] holds, in its 128-bit lane l, column 4l + j of rows 4g … 4g+3
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_store_si512(to + j * PANEL, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(to + (4 + j) * PANEL, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_store_si512(to + (8 + j) * PANEL, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_store_si512(to + (12 + j) * PANEL, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}
#endif

#if SDPO_LANES == 8
// Eight floats, or eight numbers of bfloat16 as floats.
SDPO_HD __m256 load_8(const char* from, bool bf16) {
  if (!bf16) return _mm256_loadu_ps((const float*)from);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
}

// Transposes 8 rows of 8 numbers, `stride_bytes` apart, into rows TILE_COLUMNS apart.
SDPO_HD void transpose_8(const char* from, int64_t stride_bytes, bool bf16, Unit* to) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = load_8(from + i * stride_bytes, bf16);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  // r[4g + j] holds, in its 128-bit lane l, column 4l + j of rows 4g … 4g+3
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    _mm256_storeu_ps((float*)(to + j * TILE_COLUMNS), _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    _mm256_storeu_ps((float*)(to + (4 + j) * TILE_COLUMNS), _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}
#endif

// Units [begin, end) of 64 rows of `from`, from row `first` on, transposed: a panel whose columns are these rows; rows
// past the last are 0.
template <class Type>
void pack_turned(const Matrix& from, int64_t first, int64_t begin, int64_t end, Unit* panel) {
  int64_t rows = from.rows - first < PANEL ? from.rows - first : PANEL;
  int64_t u = begin;
#if SDPO_LANES == 16
  if (from.bf16 == Type::bf16 && rows == PANEL && (Type::bf16 || !from.round)) {  // memory holds the units as they are
    int64_t whole = from.columns / Type::PER_UNIT;
    int64_t bytes = from.stride * sizeof(typename Type::Element);
    for (; u + 16 <= end && u + 16 <= whole; u += 16)
      for (int64_t row = 0; row < PANEL; row += 16)
        transpose_16((const char*)from.data + (first + row) * bytes + 4 * u, bytes, panel + (u - begin) * PANEL + row);
  }
#endif
#if SDPO_LANES == 8
  if (rows == PANEL && !from.round) {
    int64_t size = from.bf16 ? 2 : 4, bytes = from.stride * size;
    for (; u + 8 <= end && u + 8 <= from.columns; u += 8)
      for (int64_t row = 0; row < PANEL; row += 8)
        transpose_8((const char*)from.data + (first + row) * bytes + size * u, bytes, from.bf16,
                    panel + in_panel(end - begin, u - begin, row));
  }
#endif
  for (; u < end; u++)
    for (int64_t row = 0; row < PANEL; row++)
      panel[in_panel(end - begin, u - begin, row)] = row < rows ? row_unit(Type{}, from, first + row, u) : 0;
}

// Rows [first, first + count) of `from`, 64 columns from `column` on, as a panel of their units; 0 outside.
SDPO_HD void pack_rows(F32, const Matrix& from, int64_t first, int64_t count, int64_t column, Unit* panel) {
  int64_t columns = from.columns - column < PANEL ? from.columns - column : PANEL;
  int64_t inside = from.rows - first < count ? from.rows - first : count;
  memset(panel, 0, count * PANEL * sizeof(Unit));
  // row by row: rows a power of 2 apart fall into few sets of the caches, and would not stay for a second pass
  for (int64_t u = 0; u < inside; u++) {
    for (int64_t group = 0; group < columns; group += TILE_COLUMNS) {
      int64_t few = columns - group < TILE_COLUMNS ? columns - group : TILE_COLUMNS;
      int64_t at = (first + u) * from.stride + column + group;
      Unit* to = panel + in_panel(count, u, group);
      if (from.bf16)
        for (int64_t c = 0; c < few; c++) to[c] = Unit(((const uint16_t*)from.data)[at + c]) << 16;
      else if (from.round)
        for (int64_t c = 0; c < few; c++) to[c] = bits_of_float(from.number(first + u, column + group + c));
      else
        memcpy(to, (const float*)from.data + at, few * sizeof(float));
    }
  }
}

#if SDPO_BF16_DOT
SDPO_HD void pair_rows(const uint16_t* low, const uint16_t* high, Unit* to) {
  for (int c = 0; c < PANEL; c++) to[c] = pair(low[c], high[c]);
}

SDPO_HD void pack_rows(Bf16, const Matrix& from, int64_t first, int64_t count, int64_t column, Unit* panel) {
  int64_t columns = from.columns - column < PANEL ? from.columns - column : PANEL;
  uint16_t row[2][PANEL];
  for (int64_t u = 0; u < units_of<Bf16>(count); u++) {
    int64_t top = first + 2 * u;
    const uint16_t* data = (const uint16_t*)from.data + top * from.stride + column;
    if (from.bf16 && columns == PANEL && top + 1 < from.rows && 2 * u + 1 < count) {
      pair_rows(data, data + from.stride, panel + u * PANEL);
      continue;
    }

    for (int half = 0; half < 2; half++)
      for (int64_t c = 0; c < PANEL; c++) {
        bool inside = c < columns && top + half < from.rows && 2 * u + half < count;
        row[half][c] = inside ? bf16_number(from, top + half, column + c) : uint16_t(0);
      }
    pair_rows(row[0], row[1], panel + u * PANEL);
  }
}
#endif
