// The tasks of kernels.h over packing and tile of gemm.inl.

SDPO_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// S of the row at `place` of a block.
template <class Type>
void* block_row(const Blocks& s, const Lists& lists, int64_t block, int64_t place) {
  auto* data = (typename Type::Element*)s.data;
  if (lists.is_all_of_s) return data + (lists.first[block] - lists.first[0] + place) * PANEL;
  int64_t row = lists.at(block, place), at = s.row_of ? s.row_of[row] : row;
  return data + (block * s.rows + at) * PANEL;
}

// --- logits ---

// One row's 64 products → Σ E, and S if `out` is given. Column `skip`, the target's, and columns from `columns` on
// count as 0.
template <class Type, bool CAPPED>
SDPO_HD float exp_row(const float* product, const float* bias, const Head& head, float shift, int skip, int columns,
                      typename Type::Element* out) {
  float e[PANEL], s[PANEL];
  for (int j = 0; j < PANEL; j++) {
    float slope = 1.0f, a = product[j] + bias[j];
    float z = CAPPED ? tanh_and_slope(a * head.before, &slope) * head.after : a * head.before;
    float value = exp_shifted(z - shift);
    value = j == skip ? 0.0f : value;
    value = j < columns ? value : 0.0f;
    e[j] = value;
    s[j] = CAPPED ? value * slope : value;
  }

  if (out)
    for (int j = 0; j < PANEL; j++) out[j] = Type::element(s[j]);

  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int j = 0; j < PANEL; j++) total += e[j];
  return total;
}

// For rows beyond the range of exp_row: the largest z and Σ exp(z − largest).
template <class Type>
float online_row(const float* product, const float* bias, const Head& head, int skip, int columns, float* largest) {
  float z[PANEL], slope, top = -INFINITY, total = 0.0f;
  bool no_number = false;
  for (int j = 0; j < columns; j++) {
    z[j] = logit(head, product[j] + bias[j], &slope);
    if (j == skip) continue;
    top = z[j] > top ? z[j] : top;
    no_number |= z[j] != z[j];
  }
  if (no_number) top = NAN;

  for (int j = 0; j < columns; j++)
    if (j != skip && top != -INFINITY) total += exp_of(z[j] - top);  // NaN where top is
  *largest = top;
  return total;
}

// One row's 64 logits for the extras, relative to their own maximum: any z is in range.
SDPO_HD void extras_row(const float* product, const float* bias, const Head& head, int skip, int columns,
                        BlockExtras* out, float* target_z) {
  float z[PANEL], slope, top = -INFINITY, all = 0.0f, sum = 0.0f, sum_z = 0.0f, sum_sq = 0.0f;
  for (int j = 0; j < PANEL; j++) z[j] = logit(head, product[j] + bias[j], &slope);
  if (skip >= 0) *target_z = z[skip];

  // the mean logit is over all columns, everything else without the target
  for (int j = 0; j < columns; j++) all += z[j];
  for (int j = 0; j < PANEL; j++) z[j] = j == skip || j >= columns ? -INFINITY : z[j];
#pragma omp simd reduction(max : top)
  for (int j = 0; j < PANEL; j++) top = z[j] > top ? z[j] : top;

  float by = top == -INFINITY ? 0.0f : top;
#pragma omp simd reduction(+ : sum, sum_z, sum_sq)
  for (int j = 0; j < PANEL; j++) {
    float d = z[j] - by, e = exp_of(d);
    d = d < -1e30f ? -1e30f : d;  // -inf * 0 is NaN
    sum += e;
    sum_z += e * d;
    sum_sq += e * e;
  }
  *out = {top, sum, sum_z, sum_sq, all};
}

template <class Type>
void finish_rows(const Logits& l, int64_t block, int64_t first, int64_t rows, const float* c, const float* bias) {
  int64_t start = (l.first_block + block) * PANEL;
  int columns = int(smaller(PANEL, l.weight.rows - start));
  for (int64_t r = 0; r < rows; r++) {
    int64_t row = l.lists.at(block, first + r), at = block * l.n_rows + row, from_start = l.targets[row] - start;
    int skip = from_start >= 0 && from_start < PANEL ? int(from_start) : -1;

    auto* out = l.out.data ? (typename Type::Element*)block_row<Type>(l.out, l.lists, block, first + r) : nullptr;
    const float* product = c + r * PANEL;
    float sum = l.maxima        ? online_row<Type>(product, bias, l.head, skip, columns, l.maxima + at)
                : l.head.capped ? exp_row<Type, true>(product, bias, l.head, l.shift[row], skip, columns, out)
                                : exp_row<Type, false>(product, bias, l.head, l.shift[row], skip, columns, out);
    if (l.sums) l.sums[at] = sum;
    if (l.extras) extras_row(product, bias, l.head, skip, columns, l.extras + at, l.target_z + row);
  }
}

template <class Type>
int64_t logits_scratch(const Logits& l, int64_t rows) {
  int64_t panel = smaller(l.x_units, UNITS_AT_ONCE) * PANEL * 4;
  return panel + (l.x_units > UNITS_AT_ONCE ? rows : TILE_ROWS) * PANEL * 4;
}

// One block of 64 columns and some rows: pack the columns of W, multiply, and finish the rows while they are in cache.
// A width that does not fit one panel is summed in several passes over the rows.
template <class Type>
void logits(const Logits& l, int64_t block, int64_t begin, int64_t end, void* scratch) {
  if (begin == end) return;
  Unit* panel = (Unit*)scratch;
  float* c = (float*)(panel + smaller(l.x_units, UNITS_AT_ONCE) * PANEL);
  bool at_once = l.x_units <= UNITS_AT_ONCE;
  int64_t start = (l.first_block + block) * PANEL;
  float bias[PANEL] = {};
  for (int64_t j = 0; l.bias && j < PANEL && start + j < l.weight.rows; j++) bias[j] = l.bias[start + j];

  for (int64_t u = 0; u == 0 || u < l.x_units; u += UNITS_AT_ONCE) {
    int64_t units = smaller(UNITS_AT_ONCE, l.x_units - u);
    pack_turned<Type>(l.weight, start, u, u + units, panel);

    for (int64_t first = begin; first < end; first += TILE_ROWS) {
      int64_t rows = smaller(TILE_ROWS, end - first);
      float* tile_c = at_once ? c : c + (first - begin) * PANEL;
      const Unit* a[TILE_ROWS];
      float* to[TILE_ROWS];
      for (int64_t r = 0; r < rows; r++) {
        a[r] = l.x + l.lists.at(block, first + r) * l.x_units + u;
        to[r] = tile_c + r * PANEL;
      }
      if (units == 0) memset(tile_c, 0, rows * PANEL * sizeof(float));

      // sums of sums: less rounding than one long sum
      for (int64_t part = 0; part < units; part += UNITS_OF_A_SUM) {
        int64_t few = smaller(UNITS_OF_A_SUM, units - part);
        any_tile<Type, 1>(rows, a, 1, 0, few, {panel, units, part}, to, u + part > 0);
        for (int64_t r = 0; r < rows; r++) a[r] += few;
      }

      if (u + units >= l.x_units) finish_rows<Type>(l, block, first, rows, tile_c, bias);
    }
  }
}

// --- gradients ---

template <class Type>
int64_t hidden_gradient_scratch() {
  return BLOCKS_AT_ONCE * units_of<Type>(PANEL) * PANEL * 4;
}

// dX += S·W for 64 columns of H and some rows, over all blocks of the chunk.
template <class Type>
void hidden_gradient(const HiddenGradient& h, int64_t panel, int64_t row_begin, int64_t row_end, void* scratch) {
  constexpr int64_t BLOCK_UNITS = PANEL / Type::PER_UNIT;
  Unit* packed = (Unit*)scratch;
  for (int64_t block = 0; block < h.n_blocks; block += BLOCKS_AT_ONCE) {
    int64_t blocks = smaller(BLOCKS_AT_ONCE, h.n_blocks - block);
    pack_rows(Type{}, h.weight, (h.first_block + block) * PANEL, blocks * PANEL, panel * PANEL, packed);

    for (int64_t first = row_begin; first < row_end; first += TILE_ROWS) {
      int64_t rows = smaller(TILE_ROWS, row_end - first);
      const Unit* a[TILE_ROWS];
      float* c[TILE_ROWS];
      for (int64_t r = 0; r < rows; r++) {
        a[r] = (const Unit*)block_row<Type>(h.s, h.lists, block, first + r);
        c[r] = h.sum + (first + r) * h.stride + panel * PANEL;
      }
      any_tile<Type, 1>(rows, a, blocks, h.s.rows * BLOCK_UNITS, BLOCK_UNITS, {packed, blocks * BLOCK_UNITS}, c, true);
    }
  }
}

// The first place of a block whose row is at least `row`.
inline int64_t place_of(const Lists& lists, int64_t block, int64_t row) {
  int64_t low = 0, high = lists.count(block, 0);
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (lists.at(block, middle) < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The same for the rows that are listed: a tile's rows lie anywhere, so each block is a step of its own.
template <class Type>
void hidden_gradient_listed(const HiddenGradient& h, int64_t panel, int64_t row_begin, int64_t row_end, void* scratch) {
  constexpr int64_t BLOCK_UNITS = PANEL / Type::PER_UNIT;
  Unit* packed = (Unit*)scratch;
  for (int64_t block = 0; block < h.n_blocks; block++) {
    int64_t begin = place_of(h.lists, block, row_begin), end = place_of(h.lists, block, row_end);
    if (begin == end) continue;
    pack_rows(Type{}, h.weight, (h.first_block + block) * PANEL, PANEL, panel * PANEL, packed);

    for (int64_t first = begin; first < end; first += TILE_ROWS) {
      int64_t rows = smaller(TILE_ROWS, end - first);
      const Unit* a[TILE_ROWS];
      float* c[TILE_ROWS];
      for (int64_t r = 0; r < rows; r++) {
        a[r] = (const Unit*)block_row<Type>(h.s, h.lists, block, first + r);
        c[r] = h.sum + h.lists.at(block, first + r) * h.stride + panel * PANEL;
      }
      any_tile<Type, 1>(rows, a, 1, 0, BLOCK_UNITS, {packed, BLOCK_UNITS}, c, true);
    }
  }
}

template <class Type>
void scale_rows(const Unit* x, int64_t n_rows, const int32_t* list, int64_t x_units, int64_t width, const float* r,
                int64_t panel, Unit* to) {
  typename Type::Element scaled[Type::PER_UNIT][PANEL];
  int64_t columns = smaller(PANEL, width - panel * PANEL), units = units_of<Type>(n_rows);
  for (int64_t u = 0; u < units; u++) {
    memset(scaled, 0, sizeof scaled);
    for (int64_t half = 0; half < smaller(Type::PER_UNIT, n_rows - u * Type::PER_UNIT); half++) {
      int64_t place = u * Type::PER_UNIT + half, row = list ? list[place] : place;
      auto* from = (const typename Type::Element*)(x + row * x_units) + panel * PANEL;
      for (int64_t c = 0; c < columns; c++) scaled[half][c] = Type::element(Type::value(from[c]) * r[row]);
    }
    for (int64_t c = 0; c < PANEL; c++) {
      Unit unit = 0;
      for (int half = 0; half < Type::PER_UNIT; half++)
        memcpy((char*)&unit + half * sizeof scaled[0][0], &scaled[half][c], sizeof scaled[0][0]);
      to[in_panel(units, u, c)] = unit;
    }
  }
}

template <class Type>
int64_t weight_gradient_scratch(const WeightGradient& w) {
  return units_of<Type>(w.n_rows) * (LEFT_COLUMNS + (w.lists.row ? PANEL : 0)) * 4;
}

// A block of S with its rows as the summed dimension, as a left operand.
template <class Type>
void pack_block(const Blocks& s, const Lists& lists, int64_t n_rows, int64_t block, Unit* to) {
  constexpr int PER_UNIT = Type::PER_UNIT;
  static const typename Type::Element none[PANEL] = {};
  int64_t units = units_of<Type>(n_rows);
  for (int64_t u = 0; u < units; u++) {
    const typename Type::Element* row[PER_UNIT];
    for (int half = 0; half < PER_UNIT; half++) {
      int64_t i = u * PER_UNIT + half;
      row[half] = i < n_rows ? (const typename Type::Element*)block_row<Type>(s, lists, block, i) : none;
    }
    for (int64_t first = 0; first < PANEL; first += LEFT_STRIDE) {
      Unit* group = to + in_left(units, u, first);
      int64_t few = smaller(LEFT_STRIDE, PANEL - first);
      if constexpr (PER_UNIT == 1)
        memcpy(group, row[0] + first, few * 4);
      else
        for (int64_t c = 0; c < few; c++) group[c] = Unit(row[0][first + c]) | Unit(row[1][first + c]) << 16;
    }
  }
}

template <class Type>
void store_tile(const WeightGradient& w, int64_t row, int64_t column, const float* c, int64_t rows) {
  int64_t columns = smaller(PANEL, w.width - column);
  for (int64_t r = 0; r < rows; r++) {
    int64_t at = (row + r) * w.width + column;
    if (w.out_bf16)
      for (int64_t j = 0; j < columns; j++) ((uint16_t*)w.out)[at + j] = bf16_of_float(c[r * PANEL + j]);
    else
      memcpy((float*)w.out + at, c + r * PANEL, columns * sizeof(float));
  }
}

// c += Yᵀ·(t ⊙ X) for the block of W's rows from `start` on and 64 columns of H.
template <class Type>
void add_targets(const WeightGradient& w, int64_t start, int64_t panel, float* c) {
  int64_t columns = smaller(PANEL, w.width - panel * PANEL);
  for (int64_t at = w.targets.first_from(start); w.targets.is_before(at, start + PANEL); at++) {
    int64_t row = w.targets.rows[at];
    auto* x = (const typename Type::Element*)(w.x + row * w.x_units) + panel * PANEL;
    float* to = c + (w.targets.column(at) - start) * PANEL;
    for (int64_t h = 0; h < columns; h++) to[h] += w.targets.t[row] * Type::value(x[h]);
  }
}

// dW = Sᵀ·(r ⊙ X) + Yᵀ·(t ⊙ X) for one block: 64 rows of W, all of H.
template <class Type>
void weight_gradient(const WeightGradient& w, int64_t block, void* scratch) {
  Unit* packed = (Unit*)scratch;
  int64_t n_rows = w.lists.count(block, w.n_rows), all_units = units_of<Type>(n_rows);
  int64_t start = (w.first_block + block) * PANEL, columns = smaller(PANEL, w.n_columns - start);
  Unit* gathered = packed + all_units * LEFT_COLUMNS;  // r ⊙ X of the listed rows
  pack_block<Type>(w.s, w.lists, n_rows, block, packed);

  float c[PANEL * PANEL];
  for (int64_t panel = 0; panel * PANEL < w.width; panel++) {
    const Unit* right = gathered;
    if (w.lists.row)
      scale_rows<Type>(w.x, n_rows, w.lists.row + w.lists.first[block], w.x_units, w.width, w.r, panel, gathered);
    else
      right = w.scaled_x + panel * all_units * PANEL;
    if (all_units == 0) memset(c, 0, sizeof c);
    for (int64_t u = 0; u < all_units; u += UNITS_AT_ONCE)
      for (int64_t first = 0; first < columns; first += TILE_ROWS) {
        int64_t rows = smaller(TILE_ROWS, columns - first);
        const Unit* a[TILE_ROWS];
        float* to[TILE_ROWS];
        for (int64_t r = 0; r < rows; r++) {
          a[r] = packed + in_left(all_units, u, first) + r;
          to[r] = c + (first + r) * PANEL;
        }
        any_tile<Type, LEFT_STRIDE>(rows, a, 1, 0, smaller(UNITS_AT_ONCE, all_units - u), {right, all_units, u}, to,
                                    u > 0);
      }
    add_targets<Type>(w, start, panel, c);
    store_tile<Type>(w, start, panel * PANEL, c, columns);
  }
}

template <class Type>
void bias_gradient(const Blocks& s, const Lists& lists, int64_t n_rows, int64_t block, const float* r, double* to) {
  double total[PANEL] = {};
  for (int64_t place = 0; place < lists.count(block, n_rows); place++) {
    auto* row = (const typename Type::Element*)block_row<Type>(s, lists, block, place);
    float by = r[lists.at(block, place)];
    for (int j = 0; j < PANEL; j++) total[j] += double(Type::value(row[j])) * by;
  }
  memcpy(to, total, sizeof total);
}
