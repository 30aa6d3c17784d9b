// The table of tasks for one chip and operand type.
template <class Type>
const Kernels* table(const char* name) {
  static const Kernels kernels = {
      name,
      Type::bf16,
      units_of<Type>,
      load_rows<Type>,
      logits_scratch<Type>,
      logits<Type>,
      hidden_gradient_scratch<Type>,
      hidden_gradient<Type>,
      hidden_gradient_listed<Type>,
      scale_rows<Type>,
      weight_gradient_scratch<Type>,
      weight_gradient<Type>,
      bias_gradient<Type>,
      row_sum,
      row_gradient,
  };
  return &kernels;
}
