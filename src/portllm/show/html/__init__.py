"""Results as pages of HTML: one file each, that asks for nothing else and runs no program.

`markup` makes elements of which what is not markup is text, `numbers` puts numbers into words, `page` is the frame and
`figure` a picture with its numbers; `heatmap`, `bars` and `lines` draw. `check_page`, `evaluate_page`, `certify_page`
and `study_page` each take the result of a command and return its page as a text. The same result gives the same bytes.
"""
