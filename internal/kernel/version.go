package kernel

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Version is a kernel release without its vendor suffix. The zero value
// means "none".
type Version struct{ Major, Minor, Patch int }

// ParseVersion reads "6.14", "6.18.44" or a release as uname prints it
// ("6.1.0-13-amd64", "7.2.0-rc1+"); what follows the numbers is ignored.
func ParseVersion(s string) (Version, error) {
	var n [3]int
	rest := s
	for i := range n {
		end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
		if end < 0 {
			end = len(rest)
		}
		var err error
		if n[i], err = strconv.Atoi(rest[:end]); err != nil {
			return Version{}, fmt.Errorf("parse kernel version %q: want numbers as in 6.14 or 6.18.44", s)
		}
		rest = rest[end:]
		if next, ok := strings.CutPrefix(rest, "."); ok && i < 2 {
			rest = next
			continue
		}
		if i == 0 {
			return Version{}, fmt.Errorf("parse kernel version %q: want at least two numbers", s)
		}
		break
	}
	return Version{n[0], n[1], n[2]}, nil
}

// Running returns the version of the running kernel.
func Running() (Version, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Version{}, fmt.Errorf("read the kernel's version: %w", err)
	}
	return ParseVersion(unix.ByteSliceToString(u.Release[:]))
}

// Compare returns -1, 0 or +1 as v is older than, equal to or newer than w.
func (v Version) Compare(w Version) int {
	return cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Patch, w.Patch))
}

// String returns "6.14" or, when there is a patch level, "6.18.44".
func (v Version) String() string {
	if v.Patch == 0 {
		return fmt.Sprintf("%d.%d", v.Major, v.Minor)
	}
	return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch)
}
