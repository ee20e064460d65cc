package backend

import (
	"fmt"
	"testing"
)

func FuzzContentRange(f *testing.F) {
	for _, v := range []string{
		"bytes 0-0/1", "bytes 5-9/*", "bytes */10", "bytes 9-5/10", "bytes 0-10/10", "bytes -1-5/10",
		"bytes 0-9223372036854775807/*", "bytes 0-1/9223372036854775808", "items 0-1/2", "bytes 0-1", "",
	} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		first, last, size, err := parseContentRange(v)
		if err != nil {
			return
		}
		if first < 0 || last < first || size != -1 && size <= last {
			t.Fatalf("%q gives %d-%d/%d", v, first, last, size)
		}
		total := fmt.Sprint(size)
		if size == -1 {
			total = "*"
		}
		if a, b, c, err := parseContentRange(fmt.Sprintf("bytes %d-%d/%s", first, last, total)); err != nil || a != first || b != last || c != size {
			t.Fatalf("%q does not survive a round trip: %d-%d/%d, %v", v, a, b, c, err)
		}
	})
}
