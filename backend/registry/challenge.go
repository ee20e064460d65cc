package registry

import "strings"

// A challenge is what a registry says with a 401 (RFC 9110, 11.6.1).
type challenge struct {
	scheme                string // lower case; "" when there was none that we know
	realm, service, scope string // bearer only
}

// parseChallenge picks bearer, else basic, out of the WWW-Authenticate fields.
func parseChallenge(fields []string) challenge {
	var found challenge
	for _, f := range fields {
		scheme, params, _ := strings.Cut(strings.TrimSpace(f), " ")
		switch scheme = strings.ToLower(scheme); scheme {
		case "bearer":
			p := parseParams(params)
			if p["realm"] != "" {
				return challenge{scheme, p["realm"], p["service"], p["scope"]}
			}
		case "basic":
			found = challenge{scheme: scheme}
		}
	}
	return found
}

// parseParams parses name=value pairs between commas; a value may be quoted. Of a
// name that comes twice the first counts.
func parseParams(s string) map[string]string {
	params := make(map[string]string)
	for s != "" {
		name, rest, ok := strings.Cut(s, "=")
		if !ok {
			break
		}
		var value string
		value, s = cutValue(strings.TrimLeft(rest, " \t"))
		name = strings.ToLower(strings.Trim(name, " \t,"))
		if _, twice := params[name]; !twice {
			params[name] = value
		}
	}
	return params
}

// cutValue takes a value, quoted or not, from the front of s.
func cutValue(s string) (value, rest string) {
	if !strings.HasPrefix(s, `"`) {
		value, rest, _ = strings.Cut(s, ",")
		return strings.TrimSpace(value), rest
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			_, rest, _ = strings.Cut(s[i+1:], ",")
			return b.String(), rest
		case s[i] == '\\' && i+1 < len(s):
			i++
			fallthrough
		default:
			b.WriteByte(s[i])
		}
	}
	return "", "" // never closed
}
