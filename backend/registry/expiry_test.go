package registry

import (
	"net/http"
	"net/url"
	"testing"
	"time"
)

func TestExpiry(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		query string
		h     http.Header
		want  time.Duration // from now; -1: not said
	}{
		{"", nil, -1},
		{"X-Amz-Date=20261121T115900Z&X-Amz-Expires=1200", nil, 1140*time.Second - 30*time.Second},
		{"X-Amz-Date=20261121T115900Z&X-Amz-Expires=1200", http.Header{"Date": {"Sat, 21 Nov 2026 11:59:00 GMT"}}, 1200*time.Second - 30*time.Second},
		{"X-Amz-Date=20261121T115900Z&X-Amz-Expires=30", nil, 0},
		{"X-Amz-Date=20261121T115900Z", nil, -1},
		{"X-Amz-Date=soon&X-Amz-Expires=30", nil, -1},
		{"X-Goog-Date=20261121T120000Z&X-Goog-Expires=100", nil, 90 * time.Second},
		{"Expires=1795262500&Signature=x", nil, 100*time.Second - 10*time.Second},
		{"expires=100", nil, -1},
		{"se=2026-11-21T12:10:00Z&sig=x", nil, 570 * time.Second},
		{"", http.Header{"Cache-Control": {"private, Max-Age=50"}}, 45 * time.Second},
		{"", http.Header{"Cache-Control": {"no-cache, max-age=0"}}, -1},
		{"", http.Header{"Cache-Control": {"max-age=99999999999999999999"}}, -1},
		{"X-Amz-Date=20261121T120000Z&X-Amz-Expires=300", http.Header{"Cache-Control": {"max-age=20"}}, 18 * time.Second},
	} {
		u, err := url.Parse("https://h/x?" + c.query)
		if err != nil {
			t.Fatal(err)
		}
		got := expiry(u, c.h, now)
		if c.want < 0 && !got.IsZero() || c.want >= 0 && got.Sub(now) != c.want {
			t.Errorf("%s with %v: in %v, want %v", c.query, c.h, got.Sub(now), c.want)
		}
	}
}

func TestParseChallenge(t *testing.T) {
	bearer := challenge{"bearer", "https://t/x?a=b,c", "s", "repository:a:pull,push repository:b:pull"}
	for _, c := range []struct {
		fields []string
		want   challenge
	}{
		{nil, challenge{}},
		{[]string{"Digest realm=x"}, challenge{}},
		{[]string{"Basic"}, challenge{scheme: "basic"}},
		{[]string{"bAsic realm=x"}, challenge{scheme: "basic"}},
		{[]string{"Bearer"}, challenge{}},
		{[]string{`Bearer realm="`}, challenge{}},
		{[]string{`Bearer realm="x`}, challenge{}},
		{[]string{`Bearer ,,==,"`}, challenge{}},
		{[]string{`Bearer realm=x`}, challenge{scheme: "bearer", realm: "x"}},
		{[]string{`Bearer realm="https://t/x?a=b,c",service="s",scope="repository:a:pull,push repository:b:pull"`}, bearer},
		{[]string{"Basic realm=x", `BEARER Realm = "https://t/x?a=b,c" , SERVICE = s ,scope="repository:a:pull,push repository:b:pull", realm="other"`}, bearer},
		{[]string{`Bearer realm="a\"b\\c"`}, challenge{scheme: "bearer", realm: `a"b\c`}},
	} {
		if got := parseChallenge(c.fields); got != c.want {
			t.Errorf("%q gives %+v, want %+v", c.fields, got, c.want)
		}
	}
}

func FuzzParseChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://t/x",service="s",scope="repository:a:pull"`)
	f.Add(`Bearer realm="a\`)
	f.Fuzz(func(t *testing.T, s string) {
		c := parseChallenge([]string{s})
		if len(c.realm)+len(c.service)+len(c.scope) > len(s) {
			t.Errorf("%q gives more than it has: %+v", s, c)
		}
	})
}

func TestParseToken(t *testing.T) {
	sent := time.Now()
	for _, c := range []struct {
		body, want string
		lifetime   time.Duration
	}{
		{`{"token":"a"}`, "a", 0},
		{`{"access_token":"b","expires_in":100}`, "b", 90 * time.Second},
		{`{"token":"a","access_token":"b","expires_in":600}`, "a", 590 * time.Second},
		{`{"token":"a","expires_in":-5}`, "a", 0},
		{`{"token":"a","expires_in":1e300}`, "a", 24*time.Hour - 10*time.Second},
		{`{"token":"a\nb"}`, "", 0},
		{`{"token":7}`, "", 0},
		{`{}`, "", 0},
		{`SECRET`, "", 0},
		{``, "", 0},
	} {
		got, err := parseToken([]byte(c.body), sent)
		if got.value != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s gives %q, error %v", c.body, got.value, err)
		}
		if c.lifetime == 0 != got.until.IsZero() || c.lifetime != 0 && got.until.Sub(sent) != c.lifetime {
			t.Errorf("%s: good for %v, want %v", c.body, got.until.Sub(sent), c.lifetime)
		}
	}
}

// TestCheckRealm: a registry cannot make us ask addresses that are further inside than
// itself.
func TestCheckRealm(t *testing.T) {
	for _, c := range []struct {
		realm, registry string
		ok              bool
	}{
		{"https://192.0.2.1/token", "https://192.0.2.2", true},
		{"https://10.0.0.1/token", "https://10.9.9.9", true},
		{"https://[fd00::1]/token", "https://10.9.9.9", true},
		{"http://127.0.0.1:1/token", "http://127.0.0.2", true},
		{"https://192.0.2.1/token", "https://10.0.0.1", true},
		{"https://10.0.0.1/token", "https://10.0.0.1:5000", true},
		{"https://10.0.0.1/token", "https://192.0.2.1", false},
		{"https://127.0.0.1/token", "https://10.0.0.1", false},
		{"https://100.64.1.1/token", "https://192.0.2.1", false},
		{"https://[::ffff:10.0.0.1]/token", "https://192.0.2.1", false},
		{"https://169.254.169.254/token", "https://10.0.0.1", false},
		{"https://100.100.100.200/token", "https://10.0.0.1", false},
		{"https://[fe80::1]/token", "https://127.0.0.1", false},
		{"http://192.0.2.1/token", "https://192.0.2.1", false},
		{"ftp://192.0.2.1/token", "http://192.0.2.1", false},
		{"https://u:hunter2@192.0.2.1/token", "https://192.0.2.1", false},
		{"/token", "https://192.0.2.1", false},
		{"https://h:hunter2/%zz", "https://192.0.2.1", false},
	} {
		at, err := url.Parse(c.registry)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := checkRealm(t.Context(), c.realm, at); (err == nil) != c.ok {
			t.Errorf("%s for %s: error %v", c.realm, c.registry, err)
		}
	}
}

func FuzzParseHosts(f *testing.F) {
	f.Add("server = \"https://h\"\n[host.\"https://m:5000/x\"]\ncapabilities = [\"pull\"]\nclient = [[\"a\", \"b\"]]\n[host.\"https://m:5000/x\".header]\nx = [\"MARK\"]\n")
	f.Add("[host]\n\"http://h\" = {ca = [\"a\"]}\n")
	f.Add("[[host]]\nMARK\n")
	f.Fuzz(func(t *testing.T, s string) {
		_, mirrors, err := parseHosts([]byte(s), "/dir")
		if err == nil {
			for _, m := range mirrors {
				if m.host == "" || m.prefix == "/" {
					t.Errorf("%q gives %+v", s, m)
				}
			}
		}
	})
}
