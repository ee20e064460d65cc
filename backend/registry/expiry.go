package registry

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// expiry returns until when u, to which an answer with header h redirected at time now,
// may be used: zero when nothing says that. Times are taken relative to the clock of
// who signed, as far as h tells it, so that a wrong clock here does no harm.
func expiry(u *url.URL, h http.Header, now time.Time) time.Time {
	server := now
	if t, err := http.ParseTime(h.Get("Date")); err == nil {
		server = t
	}
	left := time.Duration(-1) // not said
	note := func(d time.Duration) {
		if d = max(0, d); left < 0 || d < left {
			left = d
		}
	}
	q := make(map[string]string) // names in lower case
	for name, values := range u.Query() {
		q[strings.ToLower(name)] = values[0]
	}
	for _, vendor := range []string{"x-amz-", "x-goog-", "x-oss-", "x-cos-"} {
		signed, err := time.Parse("20060102T150405Z", q[vendor+"date"])
		if s, ok := seconds(q[vendor+"expires"]); ok && err == nil {
			note(signed.Add(s).Sub(server))
		}
	}
	if at, ok := seconds(q["expires"]); ok && at > 1e9*time.Second { // a date, of CloudFront, OSS and old S3
		note(time.Unix(int64(at/time.Second), 0).Sub(server))
	}
	if t, err := time.Parse(time.RFC3339, q["se"]); err == nil { // Azure
		note(t.Sub(server))
	}
	for directive := range strings.SplitSeq(h.Get("Cache-Control"), ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
		// An age of 0 is about caches; asking anew for each range would be slow.
		if s, ok := seconds(value); ok && s > 0 && strings.EqualFold(name, "max-age") {
			note(s)
		}
	}
	if left < 0 {
		return time.Time{}
	}
	return now.Add(left - min(left/10, 30*time.Second))
}

// seconds reads a count of seconds that is not absurd.
func seconds(s string) (time.Duration, bool) {
	n, err := strconv.ParseUint(s, 10, 33)
	return time.Duration(n) * time.Second, err == nil
}
