"""Operators through which no gradient passes."""

from zilc.vjp.table import no_gradient

no_gradient(
    # shapes and indices
    "Shape", "Size", "NonZero", "ArgMax", "ArgMin", "OneHot", "ConstantOfShape", "EyeLike", "Constant",
    # comparisons and logic
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf",
    "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    # piecewise constant: the derivative is zero wherever it exists
    "Sign", "Floor", "Ceil", "Round",
    # random numbers depend on no operand's value
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
    # integers and strings
    "QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "NonMaxSuppression", "Unique", "TfIdfVectorizer", "StringNormalizer", "StringConcat", "StringSplit",
    "RegexFullMatch", "SequenceLength", "BitCast", "MelWeightMatrix", "ImageDecoder", "OptionalHasElement",
)  # fmt: skip
