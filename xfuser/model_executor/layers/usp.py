"""Import path of USP, as research code uses it."""

from xfuser.compat.attention import USP, _ft_c_input_all_to_all, _ft_c_output_all_to_all

__all__ = ["USP", "_ft_c_input_all_to_all", "_ft_c_output_all_to_all"]
