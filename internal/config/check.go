package config

import (
	"encoding/base64"
	"net/url"
	"path/filepath"
	"strings"
)

// settle leaves of the tables only the one that Type names, and finds it wrong when
// that is missing. Another one is a mistake in our own form and without effect in
// nydus's.
func (b *Backend) settle(f *findings, p path, own bool) {
	tables := []struct {
		name string
		set  bool
		drop func()
	}{
		{TypeRegistry, b.Registry != nil, func() { b.Registry = nil }},
		{TypeS3, b.S3 != nil, func() { b.S3 = nil }},
		{TypeOSS, b.OSS != nil, func() { b.OSS = nil }},
		{TypeHTTPProxy, b.HTTPProxy != nil, func() { b.HTTPProxy = nil }},
		{TypeLocalFS, b.LocalFS != nil, func() { b.LocalFS = nil }},
		{TypeLocalDisk, b.LocalDisk != nil, func() { b.LocalDisk = nil }},
	}
	known := b.Type == ""
	for _, t := range tables {
		switch {
		case t.name == b.Type:
			known = true
			if !t.set {
				f.missing(p.at(t.name))
			}
		case t.set && own:
			f.add(p.at(t.name), "the type of the backend is %q, so this has no effect", shown(b.Type))
		case t.set:
			f.warn(p.at(t.name), "has no effect: the type of the backend is "+shown(b.Type))
			t.drop()
		}
	}
	if !known {
		f.unknownType(p.at("type"), b.Type)
	}
}

func (f *findings) unknownType(p path, name string) {
	f.add(p, "unknown backend type %q, want registry, s3, oss, http-proxy, localfs or localdisk", shown(name))
}

// check finds what is wrong with the table that is set. p is the backend's place.
func (b *Backend) check(f *findings, p path, own bool) {
	b.settle(f, p, own)
	switch {
	case b.Type == TypeRegistry && b.Registry != nil:
		b.Registry.check(f, p.at(TypeRegistry), own)
	case b.Type == TypeS3 && b.S3 != nil:
		b.S3.check(f, p.at(TypeS3))
	case b.Type == TypeOSS && b.OSS != nil:
		b.OSS.check(f, p.at(TypeOSS))
	case b.Type == TypeHTTPProxy && b.HTTPProxy != nil:
		b.HTTPProxy.check(f, p.at(TypeHTTPProxy))
	case b.Type == TypeLocalFS && b.LocalFS != nil:
		b.LocalFS.check(f, p.at(TypeLocalFS))
	case b.Type == TypeLocalDisk && b.LocalDisk != nil:
		b.LocalDisk.check(f, p.at(TypeLocalDisk))
	}
}

// check lets a registry of our own form be without host and repo: then it says how all
// registries are read, and images bring their names.
func (r *Registry) check(f *findings, p path, own bool) {
	r.HTTP.check(f, p)
	checkScheme(f, p.at("scheme"), r.Scheme)
	if !own || r.Host != "" || r.Repo != "" {
		checkHost(f, p.at("host"), r.Host, true)
		required(f, p.at("repo"), r.Repo)
	}
	if r.Auth != "" && !loginBase64(r.Auth.Reveal()) {
		f.add(p.at("auth"), "want base64 of user:password")
	}
	if r.Credentials != "" {
		oneOf(f, p.at("credentials"), r.Credentials, CredentialsDocker)
	}
	checkScheme(f, p.at("blob_url_scheme"), r.BlobURLScheme)
	checkHost(f, p.at("blob_redirected_host"), r.BlobRedirectedHost, false)
}

func (s *S3) check(f *findings, p path) {
	s.HTTP.check(f, p)
	required(f, p.at("region"), s.Region)
	checkBucket(f, p, bucket{s.Scheme, s.Endpoint, s.Bucket, s.AccessKeyID, s.AccessKeySecret}, false)
}

func (s *OSS) check(f *findings, p path) {
	s.HTTP.check(f, p)
	checkBucket(f, p, bucket{s.Scheme, s.Endpoint, s.Bucket, s.AccessKeyID, s.AccessKeySecret}, true)
}

// bucket is what S3 and OSS have in common.
type bucket struct {
	scheme, endpoint, name, keyID string
	secret                        Secret
}

func checkBucket(f *findings, p path, b bucket, endpoint bool) {
	checkScheme(f, p.at("scheme"), b.scheme)
	checkHost(f, p.at("endpoint"), b.endpoint, endpoint)
	required(f, p.at("bucket_name"), b.name)
	if b.keyID == "" && b.secret != "" {
		f.missing(p.at("access_key_id"))
	}
	if b.keyID != "" && b.secret == "" {
		f.missing(p.at("access_key_secret"))
	}
}

func (h *HTTPProxy) check(f *findings, p path) {
	h.HTTP.check(f, p)
	switch {
	case h.Addr == "":
		f.missing(p.at("addr"))
	case !filepath.IsAbs(h.Addr):
		checkURL(f, p.at("addr"), h.Addr)
	}
}

func (l *LocalFS) check(f *findings, p path) {
	if l.BlobFile == "" && l.Dir == "" {
		f.add(p, "want dir or blob_file")
	}
}

func (l *LocalDisk) check(f *findings, p path) { required(f, p.at("device_path"), l.Device) }

func (h *HTTP) check(f *findings, p path) {
	if (h.ClientCert == "") != (h.ClientKey == "") {
		f.add(p.at("client_cert"), "client_cert and client_key want each other")
	}
	if h.RetryLimit != nil && (*h.RetryLimit < 0 || *h.RetryLimit > 255) {
		f.add(p.at("retry_limit"), "want 0 to 255")
	}
	if h.Proxy.URL != "" {
		checkURL(f, p.at("proxy", "url"), h.Proxy.URL)
	}
	if h.Proxy.PingURL != "" {
		checkURL(f, p.at("proxy", "ping_url"), h.Proxy.PingURL)
	}
	for i, m := range h.Mirrors {
		at := p.at("mirrors").index(i)
		checkMirrorHost(f, at.at("host"), m.Host)
		if m.PingURL != "" {
			checkURL(f, at.at("ping_url"), m.PingURL)
		}
		if m.FailureLimit < 1 {
			f.add(at.at("failure_limit"), "want at least 1")
		}
	}
}

func required(f *findings, p path, value string) {
	if value == "" {
		f.missing(p)
	}
}

func checkScheme(f *findings, p path, scheme string) {
	if scheme != "" {
		oneOf(f, p, scheme, "https", "http")
	}
}

// checkHost wants host[:port]. It never repeats what there is: that may hold a login.
func checkHost(f *findings, p path, host string, must bool) {
	if host == "" {
		if must {
			f.missing(p)
		}
		return
	}
	u, err := url.Parse("https://" + host)
	if err != nil || u.Host != host || u.Hostname() == "" || u.User != nil {
		f.add(p, "want host or host:port, without a scheme, a login and a path")
	}
}

func checkMirrorHost(f *findings, p path, host string) {
	if strings.Contains(host, "://") {
		checkURL(f, p, host)
		return
	}
	checkHost(f, p, host, true)
}

// checkURL wants an http or https URL without a login.
func checkURL(f *findings, p path, text string) {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https":
		f.add(p, "want http://host or https://host")
	case u.User != nil:
		f.add(p, "a login is not taken from this URL")
	}
}

// loginBase64 reports whether auth is base64 of user:password.
func loginBase64(auth string) bool {
	login, err := base64.StdEncoding.DecodeString(auth)
	return err == nil && strings.Contains(string(login), ":")
}
