package oss_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// fake is OSS as its documentation describes it, as far as reads go: it finds bucket and
// key, verifies the signature (version 1 and 4) and the time, and serves ranges.
type fake struct {
	id, secret, token string
	region            string // of version 4
	clock             func() time.Time

	// mu guards the fields below.
	mu       sync.Mutex
	objects  map[string][]byte // bucket/key
	versions map[string]int    // signature versions seen; "0" is none
}

func (f *fake) put(name string, data []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.objects[name] = data
}

// seen returns how often a version of signatures was used.
func (f *fake) seen(version string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.versions[version]
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Date", f.clock().UTC().Format(http.TimeFormat))
	name := strings.TrimPrefix(r.URL.Path, "/")
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = r.Host
	}
	if net.ParseIP(host) == nil { // the bucket is in the name
		bucket, _, _ := strings.Cut(host, ".")
		name = bucket + "/" + name
	}
	version, problem := f.verify(r, name)
	f.mu.Lock()
	f.versions[version]++
	data, there := f.objects[name]
	f.mu.Unlock()
	if problem != "" {
		refuse(http.StatusForbidden, problem)(w, r, nil)
		return
	}
	if !there {
		refuse(http.StatusNotFound, "NoSuchKey")(w, r, nil)
		return
	}
	var first, last int
	if n, _ := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); n == 2 && last >= len(data) && r.Header.Get("X-Oss-Range-Behavior") != "standard" {
		r.Header.Del("Range") // what OSS does with ranges that reach past the end
	}
	sum := sha256.Sum256(data)
	w.Header().Set("Etag", fmt.Sprintf(`"%X"`, sum[:16]))
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

// verify returns the version of the signature of r, and the code of what is wrong.
func (f *fake) verify(r *http.Request, name string) (version, problem string) {
	if f.token != r.Header.Get("X-Oss-Security-Token") {
		return "0", "InvalidAccessKeyId"
	}
	switch auth := r.Header.Get("Authorization"); {
	case strings.HasPrefix(auth, "OSS4-HMAC-SHA256 "):
		return "4", f.verify4(r, name, strings.TrimPrefix(auth, "OSS4-HMAC-SHA256 "))
	case strings.HasPrefix(auth, "OSS "):
		return "1", f.verify1(r, name, strings.TrimPrefix(auth, "OSS "))
	case auth == "" && f.id == "":
		return "0", ""
	}
	return "0", "AccessDenied"
}

func (f *fake) late(at time.Time, err error) bool {
	return err != nil || f.clock().Sub(at).Abs() > 15*time.Minute
}

// ossHeaders are the header fields of OSS's own and more, sorted, one a line.
func ossHeaders(r *http.Request, more ...string) string {
	lines := map[string]string{}
	for k, v := range r.Header {
		if k = strings.ToLower(k); strings.HasPrefix(k, "x-oss-") || slices.Contains(more, k) {
			lines[k] = k + ":" + strings.TrimSpace(strings.Join(v, ",")) + "\n"
		}
	}
	var all strings.Builder
	for _, k := range slices.Sorted(maps.Keys(lines)) {
		all.WriteString(lines[k])
	}
	return all.String()
}

func (f *fake) verify1(r *http.Request, name, auth string) string {
	id, signature, _ := strings.Cut(auth, ":")
	if id != f.id {
		return "InvalidAccessKeyId"
	}
	date := r.Header.Get("Date")
	if f.late(http.ParseTime(date)) {
		return "RequestTimeTooSkewed"
	}
	h := hmac.New(sha1.New, []byte(f.secret))
	fmt.Fprintf(h, "%s\n%s\n%s\n%s\n%s/%s", r.Method, r.Header.Get("Content-Md5"), r.Header.Get("Content-Type"), date, ossHeaders(r), name)
	if base64.StdEncoding.EncodeToString(h.Sum(nil)) != signature {
		return "SignatureDoesNotMatch"
	}
	return ""
}

func (f *fake) verify4(r *http.Request, name, auth string) string {
	fields := map[string]string{}
	for field := range strings.SplitSeq(auth, ",") {
		k, v, _ := strings.Cut(strings.TrimSpace(field), "=")
		fields[k] = v
	}
	id, scope, _ := strings.Cut(fields["Credential"], "/")
	if id != f.id {
		return "InvalidAccessKeyId"
	}
	stamp := r.Header.Get("X-Oss-Date")
	if f.late(time.Parse("20060102T150405Z", stamp)) {
		return "RequestTimeTooSkewed"
	}
	day := stamp[:8]
	if scope != day+"/"+f.region+"/oss/aliyun_v4_request" {
		return "InvalidArgument"
	}
	path := strings.ReplaceAll(url.QueryEscape("/"+name), "%2F", "/")
	canonical := strings.Join([]string{
		r.Method, strings.ReplaceAll(path, "+", "%20"), r.URL.RawQuery, ossHeaders(r, "content-type", "content-md5"),
		fields["AdditionalHeaders"], r.Header.Get("X-Oss-Content-Sha256"),
	}, "\n")
	sum := sha256.Sum256([]byte(canonical))
	key := []byte("aliyun_v4" + f.secret)
	for _, part := range []string{day, f.region, "oss", "aliyun_v4_request", "OSS4-HMAC-SHA256\n" + stamp + "\n" + scope + "\n" + hex.EncodeToString(sum[:])} {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(part))
		key = h.Sum(nil)
	}
	if hex.EncodeToString(key) != fields["Signature"] {
		return "SignatureDoesNotMatch"
	}
	return ""
}
