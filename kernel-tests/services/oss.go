package services

import (
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

// OSS starts a bucket in this process that speaks as Alibaba's object storage does, as far
// as reads go: it has the files of dir below prefix, for who signs with KeyID and Secret in
// the first version of its signatures. Addr is host:port.
func OSS(t testing.TB, dir, prefix string) (addr string) {
	t.Helper()
	base := "/" + Bucket + "/" + prefix
	files := http.StripPrefix(base, http.FileServer(http.Dir(dir)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if why := wrongSignature(r); why != "" {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, "<?xml version=\"1.0\"?><Error><Code>%s</Code><Message>no</Message></Error>", why)
			return
		}
		if !strings.HasPrefix(r.URL.Path, base) {
			http.NotFound(w, r)
			return
		}
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// wrongSignature returns the code of what is wrong, "" if nothing is.
func wrongSignature(r *http.Request) string {
	id, signature, ok := strings.Cut(strings.TrimPrefix(r.Header.Get("Authorization"), "OSS "), ":")
	if !ok || id != KeyID {
		return "InvalidAccessKeyId"
	}
	date := r.Header.Get("Date")
	if at, err := http.ParseTime(date); err != nil || time.Since(at).Abs() > 15*time.Minute {
		return "RequestTimeTooSkewed"
	}
	var own []string
	for name, values := range r.Header {
		if name = strings.ToLower(name); strings.HasPrefix(name, "x-oss-") {
			own = append(own, name+":"+strings.Join(values, ",")+"\n")
		}
	}
	slices.Sort(own)
	h := hmac.New(sha1.New, []byte(Secret))
	fmt.Fprintf(h, "%s\n%s\n%s\n%s\n%s%s", r.Method, r.Header.Get("Content-Md5"), r.Header.Get("Content-Type"), date, strings.Join(own, ""), r.URL.Path)
	if base64.StdEncoding.EncodeToString(h.Sum(nil)) != signature {
		return "SignatureDoesNotMatch"
	}
	return ""
}
