"""Will a patch hold on an evolved base? From headers and samples of weights, or from all of them."""
