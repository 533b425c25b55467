"""The picture at the top of the README: the head of the demo's page, as a browser shows it.

    portllm demo
    python scripts/make_picture.py portllm-demo docs/pictures/evaluate.png

The demo's numbers differ a little between machines, and the page bears the day: the picture is made anew by hand, where
the pages change. It needs Chromium, and ImageMagick to make the file small.
"""

import argparse
import base64
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.show.html.browser import opened

WIDTH, HEIGHT = 1180, 930
COLORS = 32


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="the demo's folder")
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, opened(profile) as browser:
        browser.call("Emulation.setScrollbarsHidden", hidden=True)
        browser.open(given.demo / "report.html", width=WIDTH, height=HEIGHT)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        shown = base64.b64decode(browser.call("Page.captureScreenshot", clip=clip)["data"])
    given.picture.parent.mkdir(exist_ok=True)
    small = ["convert", "-", "-strip", "+dither", "-colors", str(COLORS), f"PNG8:{given.picture}"]
    subprocess.run(small, input=shown, check=True)
    print(f"{given.picture}: {given.picture.stat().st_size} bytes")


if __name__ == "__main__":
    main()
